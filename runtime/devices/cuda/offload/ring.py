"""Who lies where on the stage while layers stream through it. Pure bookkeeping."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class Place(NamedTuple):
    """Room for one expert."""

    offset: int
    after: int
    """The turn that must be over before it may be written; -1: none."""


class StageRing:
    """Hands out the stage from its beginning to its end and over again, in turns that follow each other.

    Args:
        size_bytes: of the stage.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size = size_bytes
        self._taken: deque[tuple[int, int, int]] = deque()
        """Offset, end and turn, the oldest first."""
        self._next = 0
        self._after = -1

    def take(self, size_bytes: int, turn: int) -> Place | None:
        """Room for ``size_bytes`` until ``turn`` is over; ``None`` where only places of the same turn are left."""
        if size_bytes > self._size:
            return None
        wraps = self._next + size_bytes > self._size
        start = 0 if wraps else self._next
        leaving = 0
        # They were given places in this order, so that those in the way are the oldest.
        for item in self._taken:
            if not (_overlap(item, start, size_bytes) or (wraps and item[0] >= self._next)):
                break
            leaving += 1
        if leaving and self._taken[leaving - 1][2] == turn:
            return None
        for _ in range(leaving):
            self._after = self._taken.popleft()[2]
        self._next = start + size_bytes
        self._taken.append((start, self._next, turn))
        return Place(start, self._after)


def _overlap(item: tuple[int, int, int], start: int, size_bytes: int) -> bool:
    return item[0] < start + size_bytes and start < item[1]
