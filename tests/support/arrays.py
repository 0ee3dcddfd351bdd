"""Numpy arrays for kernels: aligned, with bfloat16 as bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moec.runtime.tensors import aligned_empty

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Tensor = NDArray[Any] | tuple[NDArray[Any], str]


def aligned(values: torch.Tensor) -> Tensor:
    """A 64-byte aligned copy; bfloat16 as its bits and its name."""
    if values.dtype == torch.bfloat16:
        return _copy(values.contiguous().view(torch.int16).numpy().view(np.uint16)), "bfloat16"
    return _copy(values.contiguous().numpy())


def plain(tensor: Tensor) -> torch.Tensor:
    """What ``aligned`` made, as a tensor again."""
    if isinstance(tensor, tuple):
        return torch.from_numpy(tensor[0].view(np.int16)).view(DTYPES[tensor[1]])
    return torch.from_numpy(tensor)


def relative_error(actual: torch.Tensor, expected: NDArray[np.float64] | torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    wanted = torch.as_tensor(expected).double()
    return float((actual.double() - wanted).abs().max() / wanted.abs().max())


def _copy(values: NDArray[Any]) -> NDArray[Any]:
    array = aligned_empty(values.shape, values.dtype)
    array[...] = values
    return array
