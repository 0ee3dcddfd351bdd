"""Which of a bundle's CUDA targets a GPU can run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from moec.errors import DeviceError
from moec.runtime.machine.interface import check_interface

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.files.manifest import TargetRecord

EARLY_LAUNCH_CAPABILITY = (9, 0)
"""From here on a kernel may begin before the one in front of it has ended."""


def architecture_name(capability: tuple[int, int]) -> str:
    """``(8, 9)`` as ``sm_89``."""
    return f"sm_{capability[0]}{capability[1]}"


def parse_architecture(name: str) -> tuple[int, int]:
    """``sm_89`` as ``(8, 9)``, ``sm_120`` as ``(12, 0)``."""
    match = re.fullmatch(r"sm_(\d+)(\d)", name)
    assert match is not None, name
    return int(match[1]), int(match[2])


def choose_cuda_target(
    targets: Sequence[TargetRecord], capability: tuple[int, int], gpu: str, cpu_features: frozenset[str]
) -> TargetRecord:
    """The CUDA target whose machine code suits a GPU best.

    Machine code runs on GPUs of its own major version and of the same or a higher minor one. A target also has PTX of
    its newest architecture, which the driver translates for GPUs that came later.

    Args:
        targets: those of the bundle.
        capability: the GPU's compute capability.
        gpu: its name, for the error.
        cpu_features: what this machine's processor has, for the part that runs on the host.

    Raises:
        DeviceError: none of them runs here.
        BundleError: the one that does was compiled by another moec.
    """
    cuda = [target for target in targets if target.kind == "cuda"]
    fitting = [target for target in cuda if _suits(target, capability) is not None]
    running = [target for target in fitting if cpu_features.issuperset(target.cpu_features)]
    if running:
        return check_interface(max(running, key=lambda target: _suits(target, capability) or (False, (0, 0))))
    if fitting:
        lacking = sorted(set(fitting[0].cpu_features) - cpu_features)
        raise DeviceError(
            "This CPU cannot run the host part of the bundle's CUDA modules.",
            f"It lacks instructions: {' '.join(lacking)}.",
            "Compile again on this machine.",
        )
    own = architecture_name(capability)
    names = "; ".join(f"{target.name} for {', '.join(target.architectures)}" for target in cuda)
    raise DeviceError(
        f"The bundle has no code for this GPU, {gpu} ({own})."
        if cuda
        else f"The bundle has no CUDA module for the GPU {gpu} ({own}).",
        f"It has {names or ', '.join(target.name for target in targets) or 'no target'}.",
        f"Compile again with --target cuda-{own}, or with --target cuda.",
    )


def _suits(target: TargetRecord, capability: tuple[int, int]) -> tuple[bool, tuple[int, int]] | None:
    """How well: machine code before PTX, then the newest; ``None``: not at all."""
    known = [parse_architecture(name) for name in target.architectures]
    same = [number for number in known if number[0] == capability[0] and number <= capability]
    if same:
        return True, max(same)
    newest = max(known, default=capability)
    return (False, newest) if newest < capability else None
