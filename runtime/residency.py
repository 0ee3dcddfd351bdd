"""Which experts are resident under a byte budget, and who leaves for whom. Pure bookkeeping in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.hosting import host_experts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moec.artifacts.footprint import LayerFootprint
    from moec.artifacts.schedule import Policy, PolicyName, RoutingProfile


@dataclass(frozen=True)
class LayerPlan:
    """What one MoE layer may keep in memory. E experts."""

    expert_bytes: int
    """Of memory that one expert occupies."""
    slots: int
    """Experts that stay."""
    spare: int
    """Experts beyond these that one use may bring in; they are dropped at the next use of any layer."""
    order: tuple[int, ...]
    """All E experts, the most used first: the first ``slots`` are there to begin with, ties fall to the last."""
    prior_uses: tuple[float, ...]
    """By expert: uses to start with."""


@dataclass(frozen=True, slots=True)
class Change:
    """What one use of experts brings in and pushes out."""

    missed: tuple[int, ...]
    """Experts of the layer in use that were not resident; now they are."""
    evicted: tuple[tuple[int, int], ...]
    """(layer, expert) that are resident no more."""
    bytes_moved: int


def plan_layers(
    layers: Sequence[LayerFootprint], profile: RoutingProfile, policy: Policy, capacity_bytes: int
) -> tuple[LayerPlan, ...]:
    """Divide ``capacity_bytes`` as the planner divides what a schedule has for experts in host memory.

    With the bytes of one of the bundle's schedules for the CPU alone the result is its ``host_experts``.
    """
    ranked = [profile.layers[layer.layer] for layer in layers]
    hosted = host_experts(layers, [each.use_share for each in ranked], capacity_bytes)
    plans: list[LayerPlan] = []
    for layer, each, slots in zip(layers, ranked, hosted.counts, strict=True):
        prior = [0.0] * layer.experts
        for expert, share in zip(each.order, each.use_share, strict=True):
            prior[expert] = policy.prior_tokens * share
        spare = hosted.transient_bytes // layer.stride_bytes
        plans.append(LayerPlan(layer.stride_bytes, slots, spare, each.order, tuple(prior)))
    return tuple(plans)


class Residency:
    """The resident experts of all MoE layers, under one policy of ``artifacts.schedule.Policy``.

    ``lfru`` evicts the expert of the layer with the least ``uses / (age + 1)``, ``lru`` the one used longest
    ago; uses and ages are counted in tokens. Where a step has many tokens, they count as one use of all their
    experts; with one token it is the policy to the letter, and ``compiler.schedule`` predicts its hits.

    Args:
        plans: of each layer.
        policy: who leaves.
    """

    def __init__(self, plans: tuple[LayerPlan, ...], policy: PolicyName = "lru") -> None:
        self._plans = plans
        self._layers = [_Layer(plan, policy) for plan in plans]
        self._transient: list[tuple[int, int]] = []
        self.resident = [layer.resident for layer in self._layers]
        """Of each layer, bool ``[E]``."""
        self.resident_bytes = 0
        self.bounded = any(plan.slots < len(plan.order) for plan in plans)
        """Whether some expert has to stay outside."""

    def seed(self) -> list[tuple[int, ...]]:
        """Fill the slots with the most used experts of each layer, and say which these are."""
        seeds = [plan.order[: plan.slots] for plan in self._plans]
        for plan, resident, experts in zip(self._plans, self.resident, seeds, strict=True):
            resident[list(experts)] = True
            self.resident_bytes += plan.expert_bytes * len(experts)
        return seeds

    def capacity(self, layer: int) -> int:
        """Experts of ``layer`` that one use can have."""
        return self._plans[layer].slots + self._plans[layer].spare

    def use(self, layer: int, experts: NDArray[np.int64], counts: NDArray[np.int64], tokens: int) -> Change:
        """Make ``experts`` (distinct, at most `capacity`) of ``layer`` resident; ``tokens`` chose among them.

        Args:
            layer: ordinal of the MoE layer.
            experts: distinct expert numbers; of missed ones the first get a slot.
            counts: how many tokens chose each.
            tokens: tokens in this use.
        """
        left = self._drop_transient()
        own, size = self._layers[layer], self._plans[layer].expert_bytes
        if self.bounded:
            own.count(experts, counts, tokens)
        missed = experts[~own.resident[experts]]
        if not missed.size:
            return Change((), left, 0)
        need = int(own.resident.sum()) + missed.size - self._plans[layer].slots
        evicted = own.evict(experts, need) if need > 0 else []
        kept = missed.size - max(0, need - len(evicted))
        self._transient = [(layer, expert) for expert in missed[kept:].tolist()]
        own.resident[missed] = True
        self.resident_bytes += size * (missed.size - len(evicted))
        gone = (*left, *((layer, expert) for expert in evicted))
        return Change(tuple(missed.tolist()), gone, size * missed.size)

    def _drop_transient(self) -> tuple[tuple[int, int], ...]:
        gone, self._transient = tuple(self._transient), []
        for layer, expert in gone:
            self.resident[layer][expert] = False
            self.resident_bytes -= self._plans[layer].expert_bytes
        return gone


class _Layer:
    """Uses and ages of one layer's experts."""

    def __init__(self, plan: LayerPlan, policy: PolicyName) -> None:
        experts = len(plan.order)
        self.resident: NDArray[np.bool_] = np.zeros(experts, np.bool_)
        self._lru = policy == "lru"
        self._uses = np.array(plan.prior_uses, np.float64)
        # The first token is number 1. Ages are 0 then, but for lru an expert not used is older than any other.
        self._last = np.full(experts, 0 if self._lru else 1, np.int64)
        self._clock = 0
        self._rank = np.zeros(experts, np.int64)
        self._rank[list(plan.order)] = np.arange(experts)

    def count(self, experts: NDArray[np.int64], counts: NDArray[np.int64], tokens: int) -> None:
        """Note that ``tokens`` tokens came, and chose ``experts``."""
        self._clock += tokens
        self._uses[experts] += counts
        self._last[experts] = self._clock

    def evict(self, pinned: NDArray[np.int64], count: int) -> list[int]:
        """Push out up to ``count`` resident experts, but none of ``pinned``."""
        free = self.resident.copy()
        free[pinned] = False
        candidates = np.flatnonzero(free)
        ages = self._clock - self._last[candidates]
        scores = -ages if self._lru else self._uses[candidates] / (ages + 1)
        leaving = candidates[np.lexsort((-self._rank[candidates], scores))[:count]]
        self.resident[leaving] = False
        evicted: list[int] = leaving.tolist()
        return evicted


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
