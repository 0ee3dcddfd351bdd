"""``plan``: from routing traces, budgets and a machine's figures to a schedule, as a pure function."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.layout.footprint import footprint
from moec.artifacts.layout.hosting import Hosted, device_slots, host_experts, host_order, take_prefix
from moec.artifacts.schedule import (
    Budgets,
    LayerSchedule,
    PrefillPlan,
    Schedule,
    ScheduleRecord,
    TierBytes,
)
from moec.artifacts.sizes import exact_bytes, human_bytes
from moec.errors import BudgetError
from moec.planning.costs.prediction import Placement, held_bytes, miss_costs, predict
from moec.planning.costs.prefetch import prefetch_plan
from moec.planning.costs.streaming import STREAM_BUFFERS, prefill_plan
from moec.planning.routing.analysis import Analysis, analyse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moec.artifacts.layout.footprint import Footprint
    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.schedule import Policy, RoutingProfile
    from moec.artifacts.traces import Traces


def plan(
    traces: Traces | None,
    model: ModelRecord,
    budgets: Budgets,
    machine: MachineRecord,
    policy: Policy | None = None,
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
        policy: which expert leaves its slot for a missed one; ``None``: the one that suits the traces best.

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
    placed = place(facts, analysis.profile, budgets, machine)
    placement, slots = placed.placement, placed.slots
    on_device = placement.on_device
    splits = miss_costs(machine, facts, on_device=on_device)
    prediction = predict(machine, facts, analysis, splits, placement)
    return Schedule(
        machine=machine,
        budgets=budgets,
        device=_with_experts(placed.device, facts, slots),
        host=placed.host,
        policy=(analysis.device if on_device else analysis.host).policy,
        layers=tuple(
            LayerSchedule(layer.layer, slot, slot, kept, split.cpu_share)
            for layer, slot, kept, split in zip(
                facts.layers, slots, placement.host_experts, splits, strict=True
            )
        ),
        prefill=(
            prefill_plan(machine, model, facts, analysis.profile, slots, budgets.step_tokens)
            if on_device
            else PrefillPlan(tuple(layer.layer for layer in facts.layers), 0, 0, 0, 0.0)
        ),
        prefetch=prefetch_plan(machine, model, facts, analysis, placement),
        prediction=prediction,
    )


@dataclass(frozen=True)
class Placed:
    """What lies where."""

    placement: Placement
    slots: tuple[int, ...]
    """On the GPU."""
    device: TierBytes
    """Without experts."""
    host: TierBytes


def place(facts: Footprint, profile: RoutingProfile, budgets: Budgets, machine: MachineRecord) -> Placed:
    """Divide the budgets among what the model has.

    Raises:
        BudgetError: a budget does not hold what must lie on its tier.
    """
    on_device = machine.gpu_name is not None and budgets.device_memory_bytes > 0
    device_limit = min(budgets.device_memory_bytes, machine.gpu_memory_bytes) if on_device else 0
    host_limit = min(budgets.host_memory_bytes, machine.host_memory_bytes)
    device, host = _fixed_bytes(facts, budgets, device_limit if on_device else None)
    _require("device", device.total, device_limit)
    _require("host", host.total + (0 if on_device else facts.working_set_bytes), host_limit)
    shares = [layer.use_share for layer in profile.layers]
    host, hosted = _host_tier(host, facts, shares, host_limit, on_device=on_device)
    slots = (0,) * len(facts.layers)
    if on_device:
        values = [layer.slot_value for layer in profile.layers]
        slots = device_slots(facts.layers, values, device_limit - device.total)
    return Placed(Placement(on_device, slots if on_device else hosted, hosted), slots, device, host)


def model_bytes(facts: Footprint, budgets: Budgets) -> TierBytes:
    """What must lie where the model is computed, before any routed expert does."""
    return TierBytes(
        dense_weights=facts.dense_bytes,
        kv_cache=facts.cache_bytes(budgets.context_tokens) + facts.states_bytes(1),
        activations=facts.activation_bytes(budgets.step_tokens),
        slot_tables=facts.table_bytes,
        stream_buffers=0,
        experts=0,
    )


def _fixed_bytes(facts: Footprint, budgets: Budgets, device_limit: int | None) -> tuple[TierBytes, TierBytes]:
    """What must lie on the device and on the host before any routed expert does; no limit: there is no device.

    Experts that all find room on the device need no buffers to stream through.
    """
    model = model_bytes(facts, budgets)
    if device_limit is None:
        return TierBytes(0, 0, 0, 0, 0, 0), model
    if model.total + facts.experts_bytes > device_limit:
        model = dataclasses.replace(model, stream_buffers=STREAM_BUFFERS * facts.working_set_bytes)
    staging = facts.staging_bytes_per_token * budgets.step_tokens
    return model, TierBytes(0, 0, staging, 0, 0, 0)


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
            f"The {tier} memory budget is {exact_bytes(needed - limit)} too small.",
            f"{exact_bytes(needed)} must lie there even with the fewest experts; the limit is {human_bytes(limit)}.",
            f"Raise the {tier} budget, or lower the context or the tokens of a step.",
        )


def _with_experts(tier: TierBytes, facts: Footprint, counts: Sequence[int]) -> TierBytes:
    return dataclasses.replace(tier, experts=held_bytes(facts.layers, counts))
