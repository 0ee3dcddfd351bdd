"""One memory block for everything a step computes: who lies where is planned once, for the largest step.

Pure arithmetic. What lives at the same time never overlaps; what does not may. Sizes do not shrink as a step's tokens
grow, so places that fit the largest step fit every smaller one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.runtime.device import padded_bytes

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence


@dataclass(frozen=True)
class Lifetime:
    """Something that needs ``size_bytes`` from the call number ``first`` to the call number ``last``."""

    key: Hashable
    size_bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class ArenaPlan:
    """Where everything lies."""

    size_bytes: int
    offsets: Mapping[Hashable, int]
    """Key to offset in the block, a multiple of ``ALIGNMENT_BYTES``."""


def plan_arena(lifetimes: Sequence[Lifetime]) -> ArenaPlan:
    """Place the largest first, each at the lowest offset that is free during its life.

    Ties go to what is needed first, then to the order given: the same input gives the same plan.
    """
    taken: dict[int, set[tuple[int, int]]] = {}
    offsets: dict[Hashable, int] = {}
    total = 0
    for life in sorted(lifetimes, key=lambda life: (-life.size_bytes, life.first)):
        assert life.key not in offsets, "two things have the same key"
        calls = range(life.first, life.last + 1)
        ranges = set[tuple[int, int]]().union(*(taken.get(call, ()) for call in calls))
        size = padded_bytes(life.size_bytes)
        start = offsets[life.key] = _first_gap(sorted(ranges), size)
        total = max(total, start + size)
        for call in calls:
            taken.setdefault(call, set()).add((start, start + size))
    return ArenaPlan(total, offsets)


def _first_gap(taken: list[tuple[int, int]], size: int) -> int:
    """The lowest offset with room for ``size`` bytes between ranges sorted by their start."""
    free = 0
    for start, end in taken:
        if free + size <= start:
            break
        free = max(free, end)
    return free
