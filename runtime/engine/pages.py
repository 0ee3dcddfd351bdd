"""Pages of the key-value cache: allocation and page tables. Pure bookkeeping, no cache memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.cache import PAGE_TOKENS
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


class PageAllocator:
    """Hands out page numbers ``0 .. total-1``; freed pages are reused last in, first out (they are warm)."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._is_free = bytearray(b"\x01" * total)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """``count`` pages, or ``None`` (and nothing changes) where fewer are free."""
        if count > len(self._free):
            return None
        pages = tuple(self._free.pop() for _ in range(count))
        for page in pages:
            self._is_free[page] = 0
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Take pages back."""
        for page in pages:
            assert not self._is_free[page], f"page {page} was freed twice"
            self._is_free[page] = 1
            self._free.append(page)


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

    def take_changed(self) -> list[int]:
        """The rows that were written since this was asked last."""
        rows = sorted(self._changed)
        self._changed.clear()
        return rows


@dataclass(slots=True)
class Lease:
    """The row and pages that one running sequence holds."""

    row: int
    pages: list[int]
    source: tuple[int, ...] = ()
    """Pages of what an encoder writes for it."""
    encoded: bool = False
    """Whether it has."""

    def missing(self, tokens: int) -> int:
        """Pages to add before ``tokens`` positions fit."""
        return max(0, pages_for(tokens) - len(self.pages))
