"""Rows of whole numbers with a scale, and perhaps a zero point, for each group of columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from moec.formats import FORMATS, Quantized, pack_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.compiler.checkpoint.record import TensorEntry
    from moec.compiler.packing.encodings.record import Parts
    from moec.formats import Format

BITS = (4, 8)
"""Of codes."""
WORD = 32
"""Bits of the words that codes are packed in, the first in the lowest bits."""
SCALE_TYPES = ("F16", "BF16", "F32")


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


class IntegerEncoding(ABC):
    """What the layouts of whole numbers have in common, as an `Encoding`: a matrix ``[N, K]`` of `IntegerRows`."""

    scales: TensorEntry
    bits: int

    @property
    @abstractmethod
    def columns(self) -> int:
        """K."""

    @property
    @abstractmethod
    def shared(self) -> int:
        """Columns that share a scale."""

    @property
    @abstractmethod
    def has_zeros(self) -> bool:
        """Whether zero points are other than the code in the middle."""

    @property
    def unlike(self) -> str:
        """What of this weight no format says; empty where there is nothing."""
        return "scales of 32 bits" if self.scales.dtype == "F32" else ""

    @abstractmethod
    def rows(self, begin: int, end: int, parts: Parts) -> IntegerRows:
        """Rows ``begin .. end``."""

    @property
    def format(self) -> str | None:
        """Integers, with zero points where it has such; a scale for more columns than theirs is repeated."""
        kinds = [
            kind
            for kind in FORMATS.values()
            if kind.codes == f"int{self.bits}"
            and kind.scale == "float16"
            and kind.zero_points == self.has_zeros
            and not kind.minima
            and (self.shared % kind.group == 0 or self.shared >= self.columns)
        ]
        return max(kinds, key=lambda kind: kind.group).name if kinds and not self.unlike else None

    @property
    def obstacle(self) -> str:
        """Why there is no format."""
        if self.format is not None:
            return ""
        if self.unlike:
            return self.unlike
        return (
            "8 bits with zero points"
            if self.bits == 8 and self.has_zeros
            else f"groups of {self.shared} columns"
        )

    def item(self, number: int) -> Self:
        """Never asked for: these layouts have a weight for each expert, no batches."""
        raise NotImplementedError

    def values(self, begin: int, end: int, parts: Parts) -> torch.Tensor:
        """Float32 ``[n, K]``."""
        return self.rows(begin, end, parts).values()

    def packed(self, kind: Format, begin: int, end: int, parts: Parts) -> torch.Tensor:
        """Rows of the same codes, scales and zero points."""
        return self.rows(begin, end, parts).packed(kind)


def middle(bits: int) -> int:
    """The code that stands for zero where there are no zero points."""
    return int(1 << (bits - 1))


def unpack_words(words: torch.Tensor, bits: int) -> NDArray[np.uint8]:
    """Codes ``[..., n * 32 / bits]`` of 32-bit words ``[..., n]``, the first in the lowest bits."""
    octets: NDArray[np.uint8] = words.contiguous().view(torch.uint8).numpy()  # little endian
    if bits == 8:
        return octets
    return np.stack((octets & 15, octets >> 4), -1).reshape(*octets.shape[:-1], -1)
