"""AWQ's packed layout (AutoAWQ, version ``gemm``): words of eight outputs, interleaved; scales and zero points a group.

A product with K inputs and N outputs has ``qweight`` I32 ``[K, N / 8]``, ``scales`` ``[G, N]`` and ``qzeros`` I32
``[G, N / 8]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.compiler.packing.encodings.errors import misfit, missing, unreadable
from moec.compiler.packing.encodings.gptq import CODES, SCALES, ZEROS
from moec.compiler.packing.encodings.integers import (
    SCALE_TYPES,
    IntegerEncoding,
    IntegerRows,
    unpack_words,
)
from moec.compiler.packing.encodings.record import Encoded

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from numpy.typing import NDArray

    from moec.compiler.checkpoint.record import TensorEntry
    from moec.compiler.packing.encodings.record import Parts

BITS = 4
OUTPUTS = 8
"""That share a word."""
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word the code of each output is, counted from the lowest bits."""


@dataclass(frozen=True)
class Awq(IntegerEncoding):
    """A weight in this layout. Its matrix is stored input-major, and so read whole."""

    codes: TensorEntry
    zeros: TensorEntry
    scales: TensorEntry
    group: int
    """Inputs that share a scale."""
    bits = BITS
    has_zeros = True
    row_step = OUTPUTS

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """All that is read."""
        return (self.codes, self.zeros, self.scales)

    @property
    def columns(self) -> int:
        """K."""
        return self.codes.shape[0]

    @property
    def shared(self) -> int:
        """The group's."""
        return self.group

    def rows(self, begin: int, end: int, parts: Parts) -> IntegerRows:
        """Of whole matrices."""
        codes, zeros = (_outputs(parts.whole(entry), begin, end) for entry in (self.codes, self.zeros))
        scales = parts.whole(self.scales)[:, begin:end].mT.float().numpy()
        groups = np.arange(self.columns) // self.group
        return IntegerRows(BITS, codes, scales, zeros, groups)


def find_awq(index: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> dict[str, Encoded]:
    """Every weight of the checkpoint in this layout.

    Raises:
        UnsupportedModelError: codes are not of 4 bits, or laid out in another version.
        CheckpointError: parts are missing or do not fit.
    """
    bits = int(quantization.get("bits", quantization.get("w_bit", BITS)))
    version = str(quantization.get("version") or quantization.get("checkpoint_format") or "gemm").lower()
    if bits != BITS or version != "gemm":
        raise unreadable(f"with AWQ to {bits} bits, version {version}", "moec reads 4 bits, version gemm.")
    size = int(quantization.get("group_size", quantization.get("q_group_size", -1)))
    found: dict[str, Encoded] = {}
    for name, codes in index.items():
        base = name.removesuffix(CODES)
        if base == name:
            continue
        names = tuple(f"{base}{part}" for part in (CODES, ZEROS, SCALES))
        for part in names:
            if part not in index:
                raise missing(part, name)
        zeros, scales = index[names[1]], index[names[2]]
        encoding = Awq(codes, zeros, scales, codes.shape[0] if size < 1 else size)
        rows = _check(base, encoding)
        found[f"{base}.weight"] = Encoded(encoding, (rows, codes.shape[0]), names)
    return found


def _check(base: str, encoding: Awq) -> int:
    """N."""
    codes, zeros, scales = encoding.entries
    if len(codes.shape) != 2 or codes.dtype not in ("I32", "U32"):
        raise misfit(base, codes, scales, "codes in a matrix of words of 32 bits")
    inputs, words = codes.shape
    groups = -(-inputs // encoding.group)
    if scales.shape != (groups, words * OUTPUTS) or scales.dtype not in SCALE_TYPES:
        raise misfit(base, codes, scales, f"floating point {(groups, words * OUTPUTS)}")
    if zeros.shape != (groups, words) or zeros.dtype != codes.dtype:
        raise misfit(base, codes, zeros, f"zero points {(groups, words)}")
    return words * OUTPUTS


def _outputs(words: torch.Tensor, begin: int, end: int) -> NDArray[np.uint8]:
    """Codes of outputs ``begin .. end``, ``[n, K]``, of words ``[K, N / 8]``."""
    first, last = begin // OUTPUTS, -(-end // OUTPUTS)
    mixed = unpack_words(words[:, first:last], BITS).reshape(len(words), -1, OUTPUTS)
    outputs = mixed[:, :, PLACES].reshape(len(words), -1)[:, begin - first * OUTPUTS : end - first * OUTPUTS]
    return np.ascontiguousarray(outputs.T)
