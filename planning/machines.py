"""The machines that ``moec compile`` makes schedules for, and the budgets it gives them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moec.artifacts.files.records import read_machine
from moec.artifacts.schedule import Budgets

if TYPE_CHECKING:
    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.model import ModelRecord

FOLDER = Path(__file__).with_name("machine_files")
"""``examples/machines/``, which travels with the installed package."""

DEVICE_SHARE = 0.9
"""Of a GPU's memory; its driver and other programs keep the rest."""
HOST_SHARE = 0.75
UNIFIED_HOST_SHARE = 0.05
"""Of host memory where the GPU shares it: all but the smallest part is better planned as device memory."""
CONTEXT_TOKENS = 4096
STEP_TOKENS = 512


def common_machines() -> tuple[MachineRecord, ...]:
    """Every description in ``examples/machines/``, by file name."""
    return tuple(read_machine(path) for path in sorted(FOLDER.glob("*.json")))


def budgets_for(
    machine: MachineRecord,
    model: ModelRecord,
    device_memory_bytes: int | None = None,
    host_memory_bytes: int | None = None,
) -> Budgets:
    """Budgets as asked, and where not asked the usual shares of what the machine has."""
    device = (
        int(machine.gpu_memory_bytes * DEVICE_SHARE) if device_memory_bytes is None else device_memory_bytes
    )
    shared = machine.unified_memory and device > 0
    host_share = UNIFIED_HOST_SHARE if shared else HOST_SHARE
    host = int(machine.host_memory_bytes * host_share) if host_memory_bytes is None else host_memory_bytes
    return Budgets(device, host, min(model.max_context, CONTEXT_TOKENS), STEP_TOKENS)
