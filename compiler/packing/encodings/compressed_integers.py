"""Whole numbers as compressed-tensors stores them: a byte each, or packed in words along a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moec.compiler.packing.encodings.integers import (
    WORD,
    IntegerEncoding,
    IntegerRows,
    middle,
    unpack_words,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.compiler.checkpoint.record import TensorEntry
    from moec.compiler.packing.encodings.record import Parts


@dataclass(frozen=True)
class CompressedIntegers(IntegerEncoding):
    """``(code - zero point) * scale`` of signed codes; words have the middle code added, so that they have no signs."""

    codes: TensorEntry
    """I32 ``[N, K * bits / 32]``, or I8 ``[N, K]``."""
    scales: TensorEntry
    """``[ceil(N / rows), G]``."""
    zeros: TensorEntry | None
    """I8 in the shape of ``scales``, or I32 ``[ceil(N * bits / 32), G]``."""
    bits: int
    block: tuple[int, int]
    """Rows and columns that share a scale."""
    row_step = 1

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """All that is read."""
        return (self.codes, self.scales, *(() if self.zeros is None else (self.zeros,)))

    @property
    def columns(self) -> int:
        """K."""
        wide = self.codes.shape[1]
        return wide * WORD // self.bits if self.codes.dtype == "I32" else wide

    @property
    def shared(self) -> int:
        """The block's."""
        return self.block[1]

    @property
    def has_zeros(self) -> bool:
        """Whether the checkpoint has them."""
        return self.zeros is not None

    def rows(self, begin: int, end: int, parts: Parts) -> IntegerRows:
        """Codes by rows, zero points in words whole."""
        raw = parts.rows(self.codes, begin, end)
        codes = unpack_words(raw, self.bits) if raw.dtype == torch.int32 else self._unsigned(raw)
        scales = self._of_rows(self.scales, begin, end, parts).float().numpy()
        groups = np.arange(self.columns) // self.block[1]
        return IntegerRows(self.bits, codes, scales, self._zeros(begin, end, parts), groups)

    def _zeros(self, begin: int, end: int, parts: Parts) -> NDArray[np.uint8] | None:
        if self.zeros is None:
            return None
        if self.zeros.dtype == "I32":
            return np.ascontiguousarray(unpack_words(parts.whole(self.zeros).mT, self.bits)[:, begin:end].T)
        return self._unsigned(self._of_rows(self.zeros, begin, end, parts))

    def _unsigned(self, signed: torch.Tensor) -> NDArray[np.uint8]:
        return (signed.numpy().astype(np.int16) + middle(self.bits)).astype(np.uint8)

    def _of_rows(self, entry: TensorEntry, begin: int, end: int, parts: Parts) -> torch.Tensor:
        """What rows of the matrix share, for each of them."""
        tall = self.block[0]
        first = begin // tall
        shared = parts.rows(entry, first, -(-end // tall))
        return shared[torch.arange(begin, end) // tall - first]
