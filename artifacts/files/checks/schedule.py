"""Whether ``schedule.json`` fits the experts of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.artifacts.model import ModelRecord
    from moec.artifacts.schedule import LayerProfile, LayerSchedule, Schedule, ScheduleRecord


def schedule_problems(model: ModelRecord, record: ScheduleRecord) -> Iterator[str]:
    """What in ``schedule.json`` does not fit the experts of the model."""
    if [profile.layer for profile in record.profile.layers] != [layer.layer for layer in model.experts]:
        yield "the routing profile is not for the MoE layers of this model"
        return
    for profile in record.profile.layers:
        yield from _profile_problems(model, profile)
    for number, schedule in enumerate(record.schedules):
        yield from (f"schedule {number}: {problem}" for problem in _one_schedule_problems(model, schedule))


def _profile_problems(model: ModelRecord, profile: LayerProfile) -> Iterator[str]:
    experts = model.experts[profile.layer].experts
    where = f"the routing profile of MoE layer {profile.layer}"
    if sorted(profile.order) != list(range(experts)) or {len(profile.use_share), len(profile.slot_value)} != {
        experts
    }:
        yield f"{where} does not rank its {experts} experts"
    if not profile.transitions:
        return
    following = model.experts[profile.layer + 1].experts if profile.layer + 1 < len(model.experts) else 0
    if len(profile.transitions) != experts:
        yield f"{where} has transitions for {len(profile.transitions)} of {experts} experts"
    if any(not 0 <= expert < following for row in profile.transitions for expert in row):
        yield f"{where} has a transition to an expert that the next MoE layer does not have"


def _one_schedule_problems(model: ModelRecord, schedule: Schedule) -> Iterator[str]:
    layers = [layer.layer for layer in model.experts]
    if [layer.layer for layer in schedule.layers] != layers:
        yield "it is not for the MoE layers of this model"
        return
    if sorted(schedule.prefill.order) != layers:
        yield "prefill does not stream every MoE layer once"
    for layer in schedule.layers:
        yield from (f"MoE layer {layer.layer}: {problem}" for problem in _layer_problems(model, layer))
    for tier, budget in (
        (schedule.device, schedule.budgets.device_memory_bytes),
        (schedule.host, schedule.budgets.host_memory_bytes),
    ):
        if tier.total > budget:
            yield f"it needs {tier.total} bytes of a budget of {budget}"


def _layer_problems(model: ModelRecord, layer: LayerSchedule) -> Iterator[str]:
    experts, top_k = model.experts[layer.layer].experts, model.experts[layer.layer].top_k
    if layer.slots > experts or layer.host_experts > experts:
        yield f"{layer.slots} slots and {layer.host_experts} host experts, but only {experts} experts"
    if layer.seeds > layer.slots:
        yield f"{layer.seeds} seeds for {layer.slots} slots"
    if len(layer.cpu_share) != top_k + 1 or any(not 0 <= c <= m for m, c in enumerate(layer.cpu_share)):
        yield f"its CPU share is not one for 0 to {top_k} misses"
