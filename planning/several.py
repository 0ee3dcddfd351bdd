"""Planning for several GPUs of a kind: a schedule for what they have together, and who has which layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.layout.footprint import CODE_BYTES, footprint
from moec.artifacts.sizes import exact_bytes
from moec.errors import BudgetError
from moec.planning.division import GpuRoom, divide, divided_chain, parts_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.schedule import Schedule
    from moec.planning.division import GpuPart
    from moec.planning.routing.analysis import Analysis


def several_gpus(machine: MachineRecord, gpus: int) -> MachineRecord:
    """A machine that has so many of its GPU, as one that has all of their memory: they take turns at a token.

    Each has an equal part of the CPU's threads, and with it of its speed.
    """
    if gpus == 1:
        return machine
    return replace(
        machine,
        gpu_name=f"{gpus} x {machine.gpu_name}",
        gpu_memory_bytes=gpus * machine.gpu_memory_bytes,
        host_efficiency=machine.host_efficiency / gpus,
    )


def planned_division(
    model: ModelRecord, analysis: Analysis, schedule: Schedule, sizes: Sequence[int]
) -> tuple[GpuPart, ...]:
    """What each GPU has, whose budgets are ``sizes``; ``schedule`` is for all of them together.

    Raises:
        BudgetError: they do not hold the model, or its chain cannot be cut so often.
    """
    facts, budgets, machine = footprint(model), schedule.budgets, schedule.machine
    tables = [schedule.device.slot_tables // max(1, len(facts.layers))] * len(facts.layers)
    chain = divided_chain(model, analysis.profile, 1, tables)
    needed = CODE_BYTES + facts.activation_bytes(budgets.step_tokens)
    rooms = [GpuRoom(size - needed, machine.gpu_bandwidth_gb_s, machine.link_gb_s) for size in sizes]
    pages = -(-budgets.context_tokens // PAGE_TOKENS)
    cuts = divide(chain, rooms, pages, resident=True) or divide(chain, rooms, pages, resident=False)
    if cuts is None:
        raise BudgetError(
            f"The model cannot be divided among {len(sizes)} GPUs with {' and '.join(map(exact_bytes, sizes))}.",
            f"Each needs {exact_bytes(needed)} for a step, code and graphs beside its layers' weights and cache; the "
            f"chain can be cut in {len(chain.places)} places.",
            "Raise --device-memory, or give fewer GPUs.",
        )
    return parts_of(model, chain, rooms, pages, cuts)
