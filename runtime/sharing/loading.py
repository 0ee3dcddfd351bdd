"""The CPU module of a bundle that runs on a GPU: whether it can compute a share of the experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.artifacts.mailbox import SERVE
from moec.errors import BundleError, DeviceError
from moec.runtime.machine.libraries import choose_cpu_target, load_libraries

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.bundle import Bundle


@dataclass(frozen=True)
class CpuSide:
    """What a bundle has for the CPU beside a GPU."""

    serve: Callable[..., Any] | None
    """``serve_experts``; ``None``: the CPU has no part."""
    note: str
    """What the user should know: which module the CPU runs, or why it runs none."""


def cpu_side(bundle: Bundle, features: frozenset[str], threads: int) -> CpuSide:
    """Load the bundle's module for this CPU.

    Args:
        bundle: its targets and files.
        features: the flags of ``/proc/cpuinfo``.
        threads: that the CPU may use; 0: none.
    """
    if threads == 0:
        return CpuSide(None, "cpu_threads is 0: missing experts go over the link alone.")
    try:
        target = choose_cpu_target(bundle.manifest.targets, features)
        serve = load_libraries(bundle.path, target.files).get(SERVE)
    except (DeviceError, BundleError) as error:
        return CpuSide(None, f"Missing experts go over the link alone. {error.what} {error.do}")
    return CpuSide(
        serve, f"{threads} CPU threads compute a share of the missing experts, with module {target.name}."
    )
