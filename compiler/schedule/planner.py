"""``plan``: from routing traces, budgets and a machine's figures to a schedule, as a pure function."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from moec.artifacts.footprint import footprint
from moec.artifacts.hosting import Hosted, host_experts, host_order, take_prefix
from moec.artifacts.schedule import (
    Budgets,
    LayerSchedule,
    Prediction,
    PrefillPlan,
    Schedule,
    ScheduleRecord,
    TierBytes,
)
from moec.compiler.schedule import cost
from moec.compiler.schedule.allocate import slot_order
from moec.compiler.schedule.analysis import Analysis, analyse
from moec.compiler.schedule.cost import MissCost, TokenCost
from moec.errors import BudgetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    import numpy.typing as npt

    from moec.artifacts.footprint import Footprint, LayerFootprint
    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.schedule import PolicyName
    from moec.artifacts.traces import Traces

STREAM_BUFFERS = 2
"""One is filled while the other is read."""


def plan(
    traces: Traces | None,
    model: ModelRecord,
    budgets: Budgets,
    machine: MachineRecord,
    policy: PolicyName = "lfru",
) -> Schedule:
    """Decide what lies where.

    A larger budget never gives fewer slots, fewer host experts, a lower hit rate or a slower prediction.
    Budgets above what the machine has are cut down to it. Without a GPU, or with ``device_memory_bytes`` 0,
    everything is planned for the CPU alone.

    Args:
        traces: routing traces, or ``None`` to take every expert to be used alike.
        model: the model.
        budgets: bytes on each tier, kept to the byte.
        machine: sizes and speeds.
        policy: which expert leaves its slot for a missed one.

    Raises:
        BudgetError: a budget does not hold what must lie on its tier.
        BundleError: the traces are of another model.
    """
    return plan_analysed(analyse(traces, model, policy), model, budgets, machine)


def plan_many(
    traces: Traces | None, model: ModelRecord, machines: Iterable[tuple[MachineRecord, Budgets]]
) -> ScheduleRecord:
    """The whole of ``schedule.json``: a schedule for each machine whose budgets hold the model at all."""
    analysis = analyse(traces, model)
    schedules: list[Schedule] = []
    for machine, budgets in machines:
        try:
            schedules.append(plan_analysed(analysis, model, budgets, machine))
        except BudgetError:
            continue
    return ScheduleRecord(analysis.profile, tuple(schedules))


def plan_analysed(
    analysis: Analysis, model: ModelRecord, budgets: Budgets, machine: MachineRecord
) -> Schedule:
    """As ``plan``, with the traces already analysed, so that many budgets cost one replay."""
    facts = footprint(model)
    on_device = machine.gpu_name is not None and budgets.device_memory_bytes > 0
    device_limit = min(budgets.device_memory_bytes, machine.gpu_memory_bytes) if on_device else 0
    host_limit = min(budgets.host_memory_bytes, machine.host_memory_bytes)
    device, host = _fixed_bytes(facts, budgets, on_device=on_device)
    _require("device", device.total, device_limit)
    _require("host", host.total + (0 if on_device else facts.working_set_bytes), host_limit)
    shares = [layer.use_share for layer in analysis.profile.layers]
    host, hosted = _host_tier(host, facts, shares, host_limit, on_device=on_device)
    splits = [_miss_cost(machine, layer, on_device=on_device) for layer in facts.layers]
    slots = [0] * len(facts.layers)
    if on_device:
        order = slot_order(_slot_curves(machine, facts, analysis, splits), facts.layers)
        slots = take_prefix(order, facts.layers, device_limit - device.total)
    tokens = _token_costs(machine, facts, analysis, splits, slots, hosted, on_device=on_device)
    return Schedule(
        machine=machine,
        budgets=budgets,
        device=_with_experts(device, facts, slots),
        host=host,
        policy=analysis.policy,
        layers=tuple(
            LayerSchedule(layer.layer, slot, slot, kept, split.cpu_share)
            for layer, slot, kept, split in zip(facts.layers, slots, hosted, splits, strict=True)
        ),
        prefill=PrefillPlan(
            order=tuple(layer.layer for layer in facts.layers),
            buffers=STREAM_BUFFERS if on_device else 0,
            buffer_bytes=facts.working_set_bytes if on_device else 0,
        ),
        prediction=_predict(machine, facts, tokens, on_device=on_device),
    )


def _slot_curves(
    machine: MachineRecord, facts: Footprint, analysis: Analysis, splits: Sequence[MissCost]
) -> list[npt.NDArray[np.float64]]:
    layers = zip(facts.layers, analysis.layers, splits, strict=True)
    return [cost.slot_curve(machine, layer, replay, split) for layer, replay, split in layers]


def _token_costs(
    machine: MachineRecord,
    facts: Footprint,
    analysis: Analysis,
    splits: Sequence[MissCost],
    slots: Sequence[int],
    hosted: Sequence[int],
    *,
    on_device: bool,
) -> list[TokenCost]:
    layers = list(zip(facts.layers, analysis.layers, strict=True))
    if not on_device:
        return [
            cost.cpu_token_cost(machine, layer, replay, kept)
            for (layer, replay), kept in zip(layers, hosted, strict=True)
        ]
    return [
        cost.token_cost(machine, layer, replay, split, slot, kept)
        for (layer, replay), split, slot, kept in zip(layers, splits, slots, hosted, strict=True)
    ]


def _fixed_bytes(facts: Footprint, budgets: Budgets, *, on_device: bool) -> tuple[TierBytes, TierBytes]:
    """What must lie on the device and on the host before any routed expert does."""
    model = TierBytes(
        dense_weights=facts.dense_bytes,
        kv_cache=facts.cache_bytes(budgets.context_tokens),
        activations=facts.activation_bytes(budgets.step_tokens),
        slot_tables=facts.table_bytes,
        stream_buffers=STREAM_BUFFERS * facts.working_set_bytes if on_device else 0,
        experts=0,
    )
    staging = facts.staging_bytes_per_token * budgets.step_tokens
    other = TierBytes(0, 0, staging if on_device else 0, 0, 0, 0)
    return (model, other) if on_device else (other, model)


def _host_tier(
    fixed: TierBytes,
    facts: Footprint,
    shares: Sequence[Sequence[float]],
    limit: int,
    *,
    on_device: bool,
) -> tuple[TierBytes, tuple[int, ...]]:
    """Fill host memory with experts; on the CPU alone, whatever a token chooses must find room besides."""
    room = limit - fixed.total
    if on_device:
        hosted = Hosted(tuple(take_prefix(host_order(shares), facts.layers, room)), 0)
    else:
        hosted = host_experts(facts.layers, shares, room)
    tier = dataclasses.replace(fixed, stream_buffers=hosted.transient_bytes)
    return _with_experts(tier, facts, hosted.counts), hosted.counts


def _require(tier: str, needed: int, limit: int) -> None:
    if needed > limit:
        raise BudgetError(
            f"The {tier} memory budget is {needed - limit} bytes too small.",
            f"{needed} bytes must lie there even with the fewest experts; the limit is {limit}.",
            f"Raise the {tier} budget, or lower the context or the tokens of a step.",
        )


def _with_experts(tier: TierBytes, facts: Footprint, counts: Sequence[int]) -> TierBytes:
    experts = sum(count * layer.stride_bytes for count, layer in zip(counts, facts.layers, strict=True))
    return dataclasses.replace(tier, experts=experts)


def _miss_cost(machine: MachineRecord, layer: LayerFootprint, *, on_device: bool) -> MissCost:
    if on_device:
        return cost.miss_cost(machine, layer)
    # The CPU alone computes whatever it is given.
    return MissCost((0.0,) * (layer.top_k + 1), tuple(range(layer.top_k + 1)))


def _predict(
    machine: MachineRecord,
    facts: Footprint,
    tokens: Sequence[TokenCost],
    *,
    on_device: bool,
) -> Prediction:
    chosen = sum(layer.top_k for layer in facts.layers)
    sizes = [layer.expert_bytes for layer in facts.layers]
    misses = sum(token.misses for token in tokens)
    dense = cost.dense_milliseconds(machine, facts.dense_bytes_per_token, on_device=on_device)

    def bytes_of(counts: Iterable[float]) -> float:
        return sum(count * size for count, size in zip(counts, sizes, strict=True))

    by_cpu = bytes_of(token.cpu_misses for token in tokens)
    missed = bytes_of(token.misses for token in tokens)
    return Prediction(
        hit_rate=1.0 - misses / chosen if chosen else 1.0,
        milliseconds_per_token=dense + sum(token.milliseconds for token in tokens),
        dense_bytes_per_token=facts.dense_bytes_per_token,
        hit_bytes_per_token=bytes_of(layer.top_k for layer in facts.layers) - missed,
        link_bytes_per_token=max(0.0, missed - by_cpu),
        cpu_bytes_per_token=by_cpu,
        file_bytes_per_token=bytes_of(token.file_misses for token in tokens),
    )
