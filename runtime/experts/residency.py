"""Which experts are resident under a byte budget, and who leaves for whom. Pure bookkeeping in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.layout.hosting import host_experts
from moec.planning.policies import PolicyState, count, initial_state, keys, replacements

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moec.artifacts.layout.footprint import LayerFootprint
    from moec.artifacts.schedule import Policy, RoutingProfile


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
    """All E experts, the most used first: the first ``slots`` are there to begin with."""
    use_shares: tuple[float, ...]
    """By expert number: the share of traced tokens that chose it."""


@dataclass(frozen=True, slots=True)
class Change:
    """What one use of experts brings in and pushes out."""

    missed: tuple[int, ...]
    """Experts of the layer in use that were not resident; now they are."""
    evicted: tuple[tuple[int, int], ...]
    """(layer, expert) that are resident no more."""
    bytes_moved: int


def plan_layers(
    layers: Sequence[LayerFootprint], profile: RoutingProfile, capacity_bytes: int
) -> tuple[LayerPlan, ...]:
    """Divide ``capacity_bytes`` as the planner divides what a schedule has for experts in host memory.

    With the bytes of one of the bundle's schedules for the CPU alone the result is its ``host_experts``.
    """
    ranked = [profile.layers[layer.layer] for layer in layers]
    hosted = host_experts(layers, [each.use_share for each in ranked], capacity_bytes)
    plans: list[LayerPlan] = []
    for layer, each, slots in zip(layers, ranked, hosted.counts, strict=True):
        shares = [0.0] * layer.experts
        for expert, share in zip(each.order, each.use_share, strict=True):
            shares[expert] = share
        spare = hosted.transient_bytes // layer.stride_bytes
        plans.append(LayerPlan(layer.stride_bytes, slots, spare, each.order, tuple(shares)))
    return tuple(plans)


class Residency:
    """The resident experts of all MoE layers, under one policy of `moec.planning.policies`.

    Where a step has many tokens, they count as one use of all their experts; with one token it is the policy to the
    letter, and `moec.planning.routing.replay` predicts its hits.

    Args:
        plans: of each layer.
        policy: who leaves. It must let every missed expert in: what is in use is in memory.
    """

    def __init__(self, plans: tuple[LayerPlan, ...], policy: Policy) -> None:
        assert policy.admission == "always", "host memory holds whatever is in use"
        self._plans, self._policy = plans, policy
        self._states: list[PolicyState] = [initial_state(policy, plan.use_shares) for plan in plans]
        self._transient: list[tuple[int, int]] = []
        self.resident = [np.zeros(len(plan.order), np.bool_) for plan in plans]
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
        resident, plan, state = self.resident[layer], self._plans[layer], self._states[layer]
        if self.bounded:
            count(self._policy, state, (experts,), counts, tokens)
        missed: list[int] = experts[~resident[experts]].tolist()
        if not missed:
            return Change((), left, 0)
        order = keys(self._policy, state)
        taken = replacements(self._policy, order, resident, experts.tolist(), plan.slots)
        evicted = [victim for _, victim in taken if victim is not None]
        self._transient = [(layer, expert) for expert in missed[len(taken) :]]
        resident[evicted] = False
        resident[missed] = True
        self.resident_bytes += plan.expert_bytes * (len(missed) - len(evicted))
        gone = (*left, *((layer, expert) for expert in evicted))
        return Change(tuple(missed), gone, plan.expert_bytes * len(missed))

    def _drop_transient(self) -> tuple[tuple[int, int], ...]:
        gone, self._transient = tuple(self._transient), []
        for layer, expert in gone:
            self.resident[layer][expert] = False
            self.resident_bytes -= self._plans[layer].expert_bytes
        return gone


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
