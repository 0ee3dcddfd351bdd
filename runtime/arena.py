"""One memory block for everything a step computes: who lies where is planned once, for the largest step.

Pure arithmetic. What lives at the same time never overlaps; what does not may. Sizes are at most linear in the tokens
of a step, so places that fit the largest step fit every smaller one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

ALIGNMENT_BYTES = 256


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
    order = sorted(lifetimes, key=lambda life: (-life.size_bytes, life.first))
    placed: list[tuple[int, int, Lifetime]] = []
    for life in order:
        taken = sorted((start, end) for start, end, other in placed if _meet(life, other))
        start, size = _first_gap(taken, life.size_bytes), _aligned(life.size_bytes)
        placed.append((start, start + size, life))
    offsets = {life.key: start for start, _, life in placed}
    assert len(offsets) == len(lifetimes), "two things have the same key"
    return ArenaPlan(max((end for _, end, _ in placed), default=0), offsets)


def _meet(left: Lifetime, right: Lifetime) -> bool:
    return left.first <= right.last and right.first <= left.last


def _first_gap(taken: list[tuple[int, int]], size: int) -> int:
    """The lowest offset with room for ``size`` bytes between ranges sorted by their start."""
    free = 0
    for start, end in taken:
        if free + size <= start:
            break
        free = max(free, end)
    return free


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
