"""What a schedule is predicted to reach: milliseconds, hits and bytes of a token, and the same over budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.layout.hosting import device_slots
from moec.artifacts.schedule import BudgetPoint, PolicyFigures, Prediction
from moec.planning.costs.token import (
    BYTES_PER_MS,
    MissCost,
    TokenCost,
    cpu_token_cost,
    dense_milliseconds,
    miss_cost,
    token_cost,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moec.artifacts.layout.footprint import Footprint, LayerFootprint
    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.schedule import RoutingProfile
    from moec.planning.routing.analysis import Analysis, Tier
    from moec.planning.routing.choice import Comparison
    from moec.planning.routing.replay import Replay

CURVE_SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
"""Of all experts' bytes: the points of a schedule's curve."""


@dataclass(frozen=True)
class Placement:
    """Where the experts of each MoE layer are."""

    on_device: bool
    """False: the CPU alone computes."""
    slots: tuple[int, ...]
    """On the device; on the CPU alone, the experts in host memory."""
    host_experts: tuple[int, ...]


def miss_costs(machine: MachineRecord, facts: Footprint, *, on_device: bool) -> list[MissCost]:
    """Of each layer; the CPU alone computes whatever it is given."""
    if on_device:
        return [miss_cost(machine, layer) for layer in facts.layers]
    return [MissCost((0.0,) * (layer.top_k + 1), tuple(range(layer.top_k + 1))) for layer in facts.layers]


def predict(
    machine: MachineRecord,
    facts: Footprint,
    analysis: Analysis,
    splits: Sequence[MissCost],
    placement: Placement,
) -> Prediction:
    """Everything that a schedule says of its decode."""
    tier = analysis.device if placement.on_device else analysis.host
    tokens = token_costs(machine, facts, tier.replay, splits, placement)
    chosen = sum(layer.top_k for layer in facts.layers)
    sizes = [layer.expert_bytes for layer in facts.layers]
    misses = sum(token.misses for token in tokens)
    dense = dense_milliseconds(machine, facts, on_device=placement.on_device)

    def bytes_of(counts: Iterable[float]) -> float:
        return sum(count * size for count, size in zip(counts, sizes, strict=True))

    by_cpu = bytes_of(token.cpu_misses for token in tokens)
    missed = bytes_of(token.misses for token in tokens)
    return Prediction(
        hit_rate=1.0 - misses / chosen if chosen else 1.0,
        optimal_hit_rate=hit_rate(facts, tier.optimal, placement.slots),
        milliseconds_per_token=dense + sum(token.milliseconds for token in tokens),
        resident_milliseconds=dense + _all_resident(machine, facts, splits, on_device=placement.on_device),
        dense_bytes_per_token=facts.dense_bytes_per_token,
        hit_bytes_per_token=bytes_of(layer.top_k for layer in facts.layers) - missed,
        link_bytes_per_token=max(0.0, missed - by_cpu),
        cpu_bytes_per_token=by_cpu,
        file_bytes_per_token=bytes_of(token.file_misses for token in tokens),
        policies=_policies(facts, analysis.comparison, placement),
        curve=_curve(machine, facts, tier, splits, analysis.profile, placement),
    )


def token_milliseconds(
    machine: MachineRecord, facts: Footprint, replay: Replay, placement: Placement
) -> float:
    """A decoded token, as `predict` has it, its experts being found as in a replay."""
    splits = miss_costs(machine, facts, on_device=placement.on_device)
    tokens = token_costs(machine, facts, replay, splits, placement)
    dense = dense_milliseconds(machine, facts, on_device=placement.on_device)
    return dense + sum(token.milliseconds for token in tokens)


def token_costs(
    machine: MachineRecord,
    facts: Footprint,
    replay: Replay,
    splits: Sequence[MissCost],
    placement: Placement,
) -> list[TokenCost]:
    """What each MoE layer costs a token, with the experts placed so."""
    rows = zip(facts.layers, replay.layers, splits, placement.slots, placement.host_experts, strict=True)
    if placement.on_device:
        return [token_cost(machine, *row) for row in rows]
    return [cpu_token_cost(machine, layer, each, kept) for layer, each, _, kept, _ in rows]


def _all_resident(
    machine: MachineRecord, facts: Footprint, splits: Sequence[MissCost], *, on_device: bool
) -> float:
    if on_device:
        return sum(split.milliseconds[0] for split in splits)
    speed = machine.host_bandwidth_gb_s * machine.host_efficiency * BYTES_PER_MS
    return sum(layer.top_k * layer.expert_bytes for layer in facts.layers) / speed


def hit_rate(facts: Footprint, replay: Replay, slots: Sequence[int]) -> float:
    """Share of chosen experts that hit with so many slots in each layer; 1 where nothing is chosen."""
    rates = [float(layer.curve[held]) for layer, held in zip(replay.layers, slots, strict=True)]
    weights = [layer.top_k for layer in facts.layers]
    return float(np.average(rates, weights=weights)) if weights else 1.0


def _policies(
    facts: Footprint, comparison: Comparison | None, placement: Placement
) -> tuple[PolicyFigures, ...]:
    """What each candidate would hit with the same slots."""
    return tuple(
        PolicyFigures(each.policy, round(hit_rate(facts, each, placement.slots), 4))
        for each in (comparison.candidates if comparison else ())
        if each.policy and (placement.on_device or each.policy.admission == "always")
    )


def _curve(
    machine: MachineRecord,
    facts: Footprint,
    tier: Tier,
    splits: Sequence[MissCost],
    profile: RoutingProfile,
    placement: Placement,
) -> tuple[BudgetPoint, ...]:
    """The same with `CURVE_SHARES` of the experts in the fastest tier, all others in host memory."""
    values = [layer.slot_value for layer in profile.layers]
    dense = dense_milliseconds(machine, facts, on_device=placement.on_device)
    everything = tuple(layer.experts for layer in facts.layers)
    chosen = sum(layer.top_k for layer in facts.layers)
    points: list[BudgetPoint] = []
    for share in CURVE_SHARES:
        slots = device_slots(facts.layers, values, int(facts.experts_bytes * share))
        tokens = token_costs(
            machine, facts, tier.replay, splits, Placement(placement.on_device, slots, everything)
        )
        misses = sum(token.misses for token in tokens)
        points.append(
            BudgetPoint(
                sum(slots),
                held_bytes(facts.layers, slots),
                1.0 - misses / chosen if chosen else 1.0,
                hit_rate(facts, tier.optimal, slots),
                dense + sum(token.milliseconds for token in tokens),
            )
        )
    return tuple(points)


def held_bytes(layers: Sequence[LayerFootprint], counts: Sequence[int]) -> int:
    """What so many experts of each layer take."""
    return sum(count * layer.stride_bytes for count, layer in zip(counts, layers, strict=True))
