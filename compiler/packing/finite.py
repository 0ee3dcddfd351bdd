"""Counting NaN and infinity: bits are looked at, so that a piece costs one pass and no large temporary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_EXPONENTS: dict[torch.dtype, np.unsignedinteger[Any]] = {
    torch.bfloat16: np.uint16(0x7F80),
    torch.float16: np.uint16(0x7C00),
    torch.float32: np.uint32(0x7F800000),
}
_STEP = 1 << 16


def nonfinite_values(values: torch.Tensor) -> int:
    """How many of ``values`` (contiguous) are NaN or infinite: their exponents have every bit set."""
    exponent = _EXPONENTS.get(values.dtype)
    if exponent is None:
        return 0
    bits = values.reshape(-1).view(torch.uint8).numpy().view(exponent.dtype)
    scratch = np.empty(min(_STEP, bits.size), exponent.dtype)
    count = 0
    for begin in range(0, bits.size, _STEP):
        part = bits[begin : begin + _STEP]
        masked = np.bitwise_and(part, exponent, out=scratch[: part.size])
        if masked.max() == exponent:
            count += int(np.count_nonzero(masked == exponent))
    return count
