"""Which experts are resident under a byte budget, and who leaves for whom. Pure bookkeeping in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.artifacts.schedule import PolicyName


@dataclass(frozen=True, slots=True)
class Change:
    """What one use of experts brings in and pushes out."""

    missed: tuple[int, ...]
    """Experts of the layer in use that were not resident; now they are."""
    evicted: tuple[tuple[int, int], ...]
    """(layer, expert) that are resident no more."""
    bytes_moved: int


class Residency:
    """The resident set of all MoE layers. Dimension names: L layers, E experts of the layer with the most.

    Policies are those of ``artifacts.schedule.Policy``: ``lfru`` evicts the expert with the least
    ``uses / (age + 1)``, ``lru`` the one used longest ago; uses and ages are counted in tokens.

    Args:
        experts: number of experts of each layer.
        expert_bytes: bytes of one expert of each layer.
        capacity_bytes: the most bytes that may be resident.
        policy: who leaves.
        rank: int64 ``[L, E]``, place of each expert in the profile's order; ties fall to the last. ``None``:
            its number.
    """

    def __init__(
        self,
        experts: tuple[int, ...],
        expert_bytes: tuple[int, ...],
        capacity_bytes: int,
        policy: PolicyName = "lru",
        rank: NDArray[np.int64] | None = None,
    ) -> None:
        shape = (len(experts), max(experts, default=0))
        self._bytes = expert_bytes
        self._capacity = capacity_bytes
        self._bounded = sum(n * size for n, size in zip(experts, expert_bytes, strict=True)) > capacity_bytes
        self._policy = policy
        self._rank = np.tile(np.arange(shape[1]), (shape[0], 1)) if rank is None else rank
        self._uses = np.zeros(shape, np.int64)
        self._last = np.zeros(shape, np.int64)
        self._clock = np.zeros(shape[0], np.int64)
        self.resident: NDArray[np.bool_] = np.zeros(shape, np.bool_)
        self.resident_bytes = 0

    @property
    def bounded(self) -> bool:
        """Whether some expert has to stay outside."""
        return self._bounded

    def capacity(self, layer: int) -> int:
        """Experts of ``layer`` that can be resident at once."""
        return self._capacity // self._bytes[layer]

    def use(self, layer: int, experts: NDArray[np.int64], counts: NDArray[np.int64], tokens: int) -> Change:
        """Make ``experts`` (distinct, at most `capacity`) of ``layer`` resident; ``tokens`` chose among them.

        Args:
            layer: ordinal of the MoE layer.
            experts: distinct expert numbers.
            counts: how many tokens chose each.
            tokens: tokens in this use.
        """
        if self._bounded:
            self._clock[layer] += tokens
            self._uses[layer, experts] += counts
            self._last[layer, experts] = self._clock[layer]
        missed = experts[~self.resident[layer, experts]]
        if not missed.size:
            return _NOTHING
        size = self._bytes[layer] * missed.size
        evicted = self._make_room(layer, experts, size)
        self.resident[layer, missed] = True
        self.resident_bytes += size
        return Change(tuple(missed.tolist()), evicted, size)

    def _make_room(self, layer: int, pinned: NDArray[np.int64], size: int) -> tuple[tuple[int, int], ...]:
        if self.resident_bytes + size <= self._capacity:
            return ()
        scores = self._scores()
        scores[~self.resident] = np.inf
        scores[layer, pinned] = np.inf
        evicted: list[tuple[int, int]] = []
        while self.resident_bytes + size > self._capacity:
            least = scores.min()
            assert least < np.inf, "experts of one use exceed the capacity"
            places = np.argwhere(scores == least)
            victim_layer, victim = max(
                places.tolist(), key=lambda place: (self._rank[place[0], place[1]], place)
            )
            scores[victim_layer, victim] = np.inf
            self.resident[victim_layer, victim] = False
            self.resident_bytes -= self._bytes[victim_layer]
            evicted.append((victim_layer, victim))
        return tuple(evicted)

    def _scores(self) -> NDArray[np.float64]:
        ages = self._clock[:, None] - self._last
        return -ages.astype(np.float64) if self._policy == "lru" else self._uses / (ages + 1)


_NOTHING = Change((), (), 0)


def split_rows(index: NDArray[np.int64], experts: int, capacity: int) -> tuple[tuple[int, int], ...]:
    """Cut the tokens of a step so that each part chooses at most ``capacity`` distinct experts.

    Args:
        index: chosen experts ``[T, K]`` with ``K <= capacity``; numbers outside ``0 .. experts-1`` are no
            experts.
        experts: E.
        capacity: the most distinct experts of one part.

    Returns:
        Row ranges ``(start, end)`` in order, covering all tokens.
    """
    ranges: list[tuple[int, int]] = []
    start, chosen = 0, set[int]()
    for row, choices in enumerate(index.tolist()):
        grown = chosen.union(choice for choice in choices if 0 <= choice < experts)
        if len(grown) > capacity:
            ranges.append((start, row))
            start, grown = row, {choice for choice in choices if 0 <= choice < experts}
        chosen = grown
    ranges.append((start, len(index)))
    return tuple(ranges)
