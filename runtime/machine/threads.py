"""The threads that kernels run on: TVM's pool, which its environment variables size when it starts.

TVM keeps one pool for each thread that calls kernels. Its size is read from ``TVM_NUM_THREADS`` when the pool
starts, and is half of the cores without it; afterwards ``config_threadpool`` can use fewer threads, never more. So a
pool is started here with all CPUs, whatever is asked for first: a later load may then ask for more.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from moec.errors import RequestError
from moec.runtime.machine.limits import cpu_quota
from moec.runtime.process import OwnProcess

DEFAULTS = {"TVM_THREAD_POOL_SPIN_COUNT": "300", "TVM_BIND_THREADS": "0"}
"""Set unless the environment has them.

An idle worker looks for work so many times before it sleeps, 0.1 to 0.4 microseconds each; waking it costs 30. TVM's
300 000 bridge any gap between kernels on a machine of one's own, but where others want the cores they take them from
those who work: two processes on two cores, 0.15 ms kernels: 1.3 ms each and up to 12; with 300, 0.68 and 0.71 at the
99th percentile, which is their share of the cores. Bound threads of several processes meet on the same core, and
TVM binds the calling thread as well, which here is Python's.
"""

_process: OwnProcess | None = None
"""The one whose pools there are: a fork of it has the forking thread's pool, and none of the threads in it."""

_BIG_CORES = 1
"""Mode of ``config_threadpool``; TVM knows no other that takes a number of threads and leaves them unbound."""


def usable_cpus() -> int:
    """The CPUs that this process may use: those of its affinity, or of its cgroup's quota where that is less."""
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return allowed if quota is None else min(allowed, quota)


def default_threads() -> int:
    """`usable_cpus`, or ``OMP_NUM_THREADS`` where that is less: as everywhere, a wish of the whole process."""
    wish = os.environ.get("OMP_NUM_THREADS", "")
    return min(usable_cpus(), int(wish)) if wish.isdecimal() and int(wish) > 0 else usable_cpus()


def helper_threads(cpu_threads: int | None = None, *, fed: bool = False) -> int:
    """CPU threads that compute experts beside a GPU: as asked for, or all but the one that waits for the GPU.

    ``fed``: another one feeds the copy engine. Threads that watch must have a core each: 15 and these two on 16 took a
    token half as long again.
    """
    return max(1, default_threads() - 1 - fed) if cpu_threads is None else cpu_threads


def use_threads(ffi: Any, threads: int | None) -> int:
    """Let the kernels that this thread calls run on ``threads`` threads; say on how many they will.

    Args:
        ffi: the module ``tvm_ffi``, TVM's runtime library loaded.
        threads: ``None``: `default_threads`, or all of a pool that somebody else started with fewer.

    Raises:
        RequestError: the pool is running and has fewer, or its threads were lost when this process was forked.
    """
    global _process  # noqa: PLW0603
    _process = _process or OwnProcess()
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    configure = ffi.get_global_func("runtime.config_threadpool")
    running = ffi.get_global_func("runtime.NumThreads")
    wanted = default_threads() if threads is None else threads
    if wanted > 1 and not _process.here and threading.current_thread() is threading.main_thread():
        raise RequestError(
            f"{wanted} CPU threads cannot work in this process.",
            "It was forked from one that had loaded a model, and the threads of that one did not go along.",
            "Give cpu_threads=1, load and use the model in a new thread, or start processes by spawn.",
        )
    os.environ["TVM_NUM_THREADS"] = str(max(wanted, usable_cpus()))
    before: int = running()
    configure(_BIG_CORES, wanted)
    used: int = running()
    if threads is not None and used < threads:
        configure(_BIG_CORES, before)
        raise RequestError(
            f"cpu_threads={threads}, but this process has a pool of {used} threads.",
            "TVM fixes a pool's size when its first kernel runs.",
            f"Ask for at most {used}, or load first with the most threads that will be needed.",
        )
    # Read again by every launch, where 1 spares the pool, and by pools of other threads, should they call kernels.
    os.environ["TVM_NUM_THREADS"] = str(used)
    return used
