"""Whether the figures of a machine description belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.artifacts.machine import MachineRecord


def machine_problems(machine: MachineRecord) -> Iterator[str]:
    """What in a machine description contradicts whether it has a GPU."""
    of_gpu = {
        "gpu_memory_bytes": machine.gpu_memory_bytes,
        "gpu_bandwidth_gb_s": machine.gpu_bandwidth_gb_s,
        "link_gb_s": machine.link_gb_s,
    }
    for name, value in of_gpu.items():
        if machine.gpu_name is not None and value == 0:
            yield f"{name} is 0, and it has the GPU {machine.gpu_name}"
        elif machine.gpu_name is None and value != 0:
            yield f"{name} is {value:g}, and gpu_name says that it has no GPU"
