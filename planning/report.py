"""The memory report at the end of ``moec compile``: what the model needs and gets at several budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.errors import BudgetError
from moec.planning.planner import plan_analysed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.schedule import Budgets, Schedule
    from moec.planning.routing.analysis import Analysis


@dataclass(frozen=True)
class MemoryRow:
    """One machine with one pair of budgets."""

    machine: str
    device_memory_bytes: int
    host_memory_bytes: int
    problem: str | None
    """Why the model does not fit, or ``None``; then the figures below are 0."""
    device_used_bytes: int
    host_used_bytes: int
    slots: int
    """Expert slots on the device, in all MoE layers together."""
    host_experts: int
    experts: int
    """Routed experts of the model."""
    hit_rate: float
    milliseconds_per_token: float


def memory_report(
    analysis: Analysis, model: ModelRecord, pairs: Iterable[tuple[MachineRecord, Budgets]]
) -> tuple[MemoryRow, ...]:
    """Plan each pair of machine and budgets, and say what comes out, or why nothing does."""
    experts = sum(layer.experts for layer in model.experts)
    rows: list[MemoryRow] = []
    for machine, budgets in pairs:
        try:
            rows.append(row_of(plan_analysed(analysis, model, budgets, machine), experts))
        except BudgetError as error:
            device, host = budgets.device_memory_bytes, budgets.host_memory_bytes
            rows.append(MemoryRow(machine.name, device, host, error.what, 0, 0, 0, 0, experts, 0.0, 0.0))
    return tuple(rows)


def row_of(schedule: Schedule, experts: int) -> MemoryRow:
    """What one schedule comes to; ``experts`` is the number of routed experts of the model."""
    return MemoryRow(
        machine=schedule.machine.name,
        device_memory_bytes=schedule.budgets.device_memory_bytes,
        host_memory_bytes=schedule.budgets.host_memory_bytes,
        problem=None,
        device_used_bytes=schedule.device.total,
        host_used_bytes=schedule.host.total,
        slots=sum(layer.slots for layer in schedule.layers),
        host_experts=sum(layer.host_experts for layer in schedule.layers),
        experts=experts,
        hit_rate=schedule.prediction.hit_rate,
        milliseconds_per_token=schedule.prediction.milliseconds_per_token,
    )
