"""Budgets that hold a given share of the routed experts: the rows of the memory report."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from moec.artifacts.layout.footprint import footprint
from moec.artifacts.schedule import Budgets
from moec.planning.costs.streaming import STREAM_BUFFERS
from moec.planning.machines import CONTEXT_TOKENS, STEP_TOKENS
from moec.planning.planner import model_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.model import ModelRecord

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def share_budgets(
    model: ModelRecord, machines: Iterable[MachineRecord], kinds: Collection[str]
) -> list[tuple[MachineRecord, Budgets]]:
    """Budgets that hold each of ``SHARES`` of the experts, on one machine without a GPU and one with.

    They are the first of ``machines``, with their sizes set aside so that every row is there; ``kinds`` are those
    of the bundle's targets.
    """
    facts = footprint(model)
    context = min(model.max_context, CONTEXT_TOKENS)
    fixed = model_bytes(facts, Budgets(0, 0, context, STEP_TOKENS)).total
    rows: list[tuple[MachineRecord, Budgets]] = []
    for kind, machine in _one_of_each(machines).items():
        if kind not in kinds:
            continue
        roomy = dataclasses.replace(machine, gpu_memory_bytes=1 << 60, host_memory_bytes=1 << 60)
        for share in SHARES:
            held = int(facts.experts_bytes * share)
            if kind == "cpu":
                budgets = Budgets(0, max(fixed + held, fixed + facts.working_set_bytes), context, STEP_TOKENS)
            else:
                device = fixed + STREAM_BUFFERS * facts.working_set_bytes + held
                budgets = Budgets(device, 1 << 60, context, STEP_TOKENS)
            rows.append((roomy, budgets))
    return rows


def _one_of_each(machines: Iterable[MachineRecord]) -> dict[str, MachineRecord]:
    chosen: dict[str, MachineRecord] = {}
    for machine in machines:
        chosen.setdefault("cpu" if machine.gpu_name is None else "cuda", machine)
    return chosen
