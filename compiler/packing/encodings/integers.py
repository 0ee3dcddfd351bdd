"""Rows of whole numbers with a scale, and perhaps a zero point, for each group of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moec.formats import FORMATS, Quantized, pack_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.formats import Format

BITS = (4, 8)
"""Of codes."""
WORD = 32
"""Bits of the words that codes are packed in, the first in the lowest bits."""


@dataclass(frozen=True, eq=False)
class IntegerRows:
    """``(code - zero) * scale``, with the zero point and the scale of the column's group."""

    bits: int
    codes: NDArray[np.uint8]
    """``[n, K]``, from 0 up."""
    scales: NDArray[np.float32]
    """``[n, G]``."""
    zeros: NDArray[np.uint8] | None
    """``[n, G]``; None: the code in the middle."""
    groups: NDArray[np.int64]
    """The group of each column, ``[K]``."""

    def values(self) -> torch.Tensor:
        """Float32 ``[n, K]``: exact where scales are of 16 bits."""
        values = self.codes.astype(np.float32)
        if self.zeros is None:
            values -= middle(self.bits)
        else:
            values -= self.zeros.astype(np.float32)[:, self.groups]
        values *= self.scales[:, self.groups]
        return torch.from_numpy(values)

    def packed(self, kind: Format) -> torch.Tensor:
        """Rows of the format, uint8 ``[n, row_bytes]``; groups of theirs lie within ours, which lie in order."""
        columns = self.codes.shape[1]
        groups = self.groups[np.arange(0, columns, kind.group)]
        codes = self.codes if self.bits == 4 else (self.codes.astype(np.int16) - middle(8)).astype(np.int8)
        zeros = None
        if kind.zero_points:
            assert self.zeros is not None
            zeros = self.zeros[:, groups]
        scales = self.scales[:, groups].astype(np.float16)
        return torch.from_numpy(pack_rows(kind, Quantized(codes, scales, zeros)))


def middle(bits: int) -> int:
    """The code that stands for zero where there are no zero points."""
    return int(1 << (bits - 1))


def integer_format(bits: int, group: int, columns: int, *, zero_points: bool) -> str | None:
    """The format of codes with a scale for ``group`` neighbouring columns; None where there is none.

    A scale for more columns than the format's groups have is repeated.
    """
    kinds = [
        kind
        for kind in FORMATS.values()
        if kind.codes == f"int{bits}"
        and kind.scale == "float16"
        and kind.zero_points == zero_points
        and not kind.minima
        and (group % kind.group == 0 or group >= columns)
    ]
    return max(kinds, key=lambda kind: kind.group).name if kinds else None


def integer_obstacle(bits: int, group: int, *, zero_points: bool) -> str:
    """Why `integer_format` found none."""
    if bits == 8 and zero_points:
        return "8 bits with zero points"
    return f"groups of {group} columns"


def unpack_words(words: torch.Tensor, bits: int) -> NDArray[np.uint8]:
    """Codes ``[..., n * 32 / bits]`` of 32-bit words ``[..., n]``, the first in the lowest bits."""
    octets: NDArray[np.uint8] = words.contiguous().view(torch.uint8).numpy()  # little endian
    if bits == 8:
        return octets
    return np.stack((octets & 15, octets >> 4), -1).reshape(*octets.shape[:-1], -1)
