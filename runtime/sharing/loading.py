"""The CPU module of a bundle that runs on a GPU: whether it can compute a share of the experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.artifacts.words.mailbox import SERVE
from moec.artifacts.words.orders import FEED
from moec.errors import BundleError, DeviceError
from moec.runtime.machine.libraries import choose_cpu_target, load_libraries

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moec.artifacts.files.bundle import Bundle


@dataclass(frozen=True)
class CpuSide:
    """What a bundle has for the CPU beside a GPU."""

    serve: Callable[..., Any] | None
    """``serve_experts``; ``None``: the CPU has no part."""
    feed: Callable[..., Any] | None
    """``feed_copies``; ``None``: the GPU reads host memory itself."""
    experts: Mapping[str, Callable[..., Any]]
    """``experts_<body>`` of each body that the CPU computes for many tokens; none where it has no part."""
    note: str
    """What the user should know: which module the CPU runs, or why it runs none."""


def cpu_side(
    bundle: Bundle, features: frozenset[str], threads: int, copy_thread: bool | None = None
) -> CpuSide:
    """Load the bundle's module for this CPU.

    Args:
        bundle: its targets and files.
        features: the flags of ``/proc/cpuinfo``.
        threads: that the CPU may use; 0: none.
        copy_thread: whether one more feeds the GPU's copy engine; ``None``: it may, where there are any.

    Raises:
        BundleError: a thread is to feed the copy engine, and the bundle has no function for it on this CPU.
        DeviceError: the same, where it has no module for this CPU.
    """
    alone = "cpu_threads is 0: missing experts go over the link alone."
    if threads == 0 and not copy_thread:
        return CpuSide(None, None, {}, alone)
    try:
        target = choose_cpu_target(bundle.manifest.targets, features)
        functions = load_libraries(bundle.path, target.files)
        serve = functions.get(SERVE)
    except (DeviceError, BundleError) as error:
        if copy_thread:
            raise
        return CpuSide(None, None, {}, f"Missing experts go over the link alone. {error.what} {error.do}")
    feed = None if copy_thread is False or not (copy_thread or functions.has(FEED)) else functions.get(FEED)
    if threads == 0:
        return CpuSide(None, feed, {}, alone)
    note = f"{threads} CPU threads compute a share of the missing experts, with module {target.name}."
    names = {body.name: f"experts_{body.name}" for body in bundle.model.bodies}
    experts = {body: functions.get(name) for body, name in names.items() if functions.has(name)}
    return CpuSide(serve, feed, experts, note)
