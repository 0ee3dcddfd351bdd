"""What the GPU does while something runs, by torch's profiler, and how a process ends that has used it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Event(NamedTuple):
    """What the GPU did from ``start`` to ``end``, microseconds."""

    start: float
    end: float
    name: str


def gpu_events(run: Callable[[], object]) -> list[Event]:
    """Kernels and copies of ``run``, by start."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events: list[Any] = [event for event in found.events() if event.device_type.name == "CUDA"]
    return sorted(Event(event.time_range.start, event.time_range.end, event.name) for event in events)


def kernels(events: Iterable[Event]) -> list[Event]:
    """What of it neither copies nor fills memory."""
    return [event for event in events if not event.name.startswith("Mem")]


def run_and_leave(main: Callable[[], object]) -> None:
    """Run a command to its end, and end the process there, without what libraries do at exit.

    torch's profiler listens to the driver to the last. CUDA's runtime lets go of the GPU at exit, when the profiler's
    own objects are gone, and what it is told then reads freed memory: one of six runs ended in ``free(): invalid
    pointer``, and with freed memory overwritten (``MALLOC_PERTURB_``) every run faulted or hung.
    """
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
