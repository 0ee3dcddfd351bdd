"""Pages of the key-value cache: how many are needed, and which are whose. Pure bookkeeping, no cache memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.runtime.tensors import aligned_zeros

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


def pages_for(tokens: int) -> int:
    """Pages that hold ``tokens`` positions."""
    return -(-tokens // PAGE_TOKENS)


def table_rows(max_batch: int, *, sources: bool) -> int:
    """Rows of the page table: of each sequence that runs at once and a spare one; as many again for their sources."""
    return (max_batch + 1) * (2 if sources else 1)


class PageTable:
    """Which pages hold the positions of each running sequence: int32 ``[rows, pages_per_row]``.

    Kernels read ``array``; the entry ``[row, i]`` is the page of positions ``i * PAGE_TOKENS ..``.
    """

    def __init__(self, rows: int, context: int) -> None:
        self.array: NDArray[np.int32] = aligned_zeros((rows, max(1, pages_for(context))), np.int32)
        self._changed: set[int] = set()

    def assign(self, row: int, first: int, pages: tuple[int, ...]) -> None:
        """Write the pages number ``first ..`` of the sequence in ``row``."""
        self.array[row, first : first + len(pages)] = pages
        self._changed.add(row)

    @property
    def changed(self) -> list[int]:
        """The rows that were written since they were `shown` last."""
        return sorted(self._changed)

    def shown(self, rows: Iterable[int]) -> None:
        """Whoever reads these ``rows`` has them now."""
        self._changed.difference_update(rows)


@dataclass(slots=True)
class Lease:
    """The row and pages that one running sequence holds."""

    row: int
    pages: list[int]
    source: tuple[int, ...] = ()
    """Pages of what an encoder writes for it."""
    encoded: bool = False
    """Whether it has."""
    settled: int = 0
    """Of ``pages``, those from the first one on that are full and never written again; others may hold them too."""

    def missing(self, tokens: int) -> int:
        """Pages to add before ``tokens`` positions fit."""
        return max(0, pages_for(tokens) - len(self.pages))
