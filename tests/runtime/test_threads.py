from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from moec.runtime.machine import limits as machine
from moec.runtime.machine import threads
from moec.runtime.machine.threads import usable_cpus

if TYPE_CHECKING:
    from pathlib import Path

SETUP = """
import ctypes, os, threading
from moec.errors import RequestError
from moec.runtime.machine.libraries import load_runtime

def threads_at_work():
    "System ids of the threads that TVM's pool hands a piece of work to, which is what a parallel kernel does."
    seen = set()
    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    def work(task, group, data):
        seen.add(threading.get_native_id())
        return 0
    assert ctypes.CDLL(None).TVMBackendParallelLaunch(work, None, 0) == 0
    return len(seen)

cores = len(os.sched_getaffinity(0))
"""


def run(code: str, **environment: str) -> list[str]:
    """Lines that ``code`` prints in a process of its own: TVM's pool cannot be started twice in one."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(("TVM_", "OMP_"))}
    result = subprocess.run(
        [sys.executable, "-c", SETUP + code],
        check=True,
        capture_output=True,
        text=True,
        env=base | environment,
    )
    return result.stdout.splitlines()


def test_as_many_threads_work_as_were_asked_for() -> None:
    code = "for n in (3, 1, 2, 3): print(load_runtime(n), threads_at_work())"
    assert run(code, OMP_NUM_THREADS="1") == ["3 3", "1 1", "2 2", "3 3"]


def test_all_cores_work_by_default_and_none_is_bound() -> None:
    code = """
print(load_runtime(None) == threads_at_work() == cores)
print({len(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")} == {cores})
"""
    assert run(code) == ["True", "True"]


def test_openmps_wish_is_the_default_but_no_limit() -> None:
    code = "print(load_runtime(None), load_runtime(cores))"
    assert run(code, OMP_NUM_THREADS="1") == [f"1 {len(os.sched_getaffinity(0))}"]


def test_more_threads_than_the_running_pool_has_are_refused_and_nothing_changes() -> None:
    code = """
load_runtime(1)
print(load_runtime(cores))
try:
    load_runtime(cores + 1)
except RequestError as error:
    print(error.what)
print(threads_at_work())
"""
    cores = len(os.sched_getaffinity(0))
    message = f"cpu_threads={cores + 1}, but this process has a pool of {cores} threads."
    assert run(code) == [str(cores), message, str(cores)]


def test_a_forked_process_does_not_wait_for_threads_that_it_has_not() -> None:
    code = """
from moec.runtime.machine import threads
threads.usable_cpus = lambda: 2
load_runtime(2)
if not os.fork():
    try:
        load_runtime(None)
    except RequestError as error:
        print(error.what)
    print(load_runtime(1), threads_at_work())
    other = threading.Thread(target=lambda: print(load_runtime(2), threads_at_work()))
    other.start()
    other.join()
    sys.stdout.flush()
    os._exit(0)
os.wait()
print(threads_at_work())
"""
    assert run("import sys" + code) == ["2 CPU threads cannot work in this process.", "1 1", "2 2", "2"]


def test_by_default_a_smaller_pool_that_is_running_is_used_as_it_is() -> None:
    code = """
from moec.runtime.machine import threads
threads.usable_cpus = lambda: 2
load_runtime(2)
threads.usable_cpus = lambda: 4
print(load_runtime(None), threads_at_work())
try:
    load_runtime(3)
except RequestError:
    print("refused", threads_at_work())
"""
    assert run(code) == ["2 2", "refused 2"]


def test_a_model_used_from_another_thread_has_no_more_threads() -> None:
    code = """
load_runtime(1)
counts = []
other = threading.Thread(target=lambda: counts.append(threads_at_work()))
other.start()
other.join()
print(counts)
"""
    assert run(code) == ["[1]"]


def test_the_environment_decides_how_long_idle_workers_spin() -> None:
    code = "load_runtime(1); print(os.environ['TVM_THREAD_POOL_SPIN_COUNT'], os.environ['TVM_BIND_THREADS'])"
    assert run(code) == ["300 0"]
    assert run(code, TVM_THREAD_POOL_SPIN_COUNT="7", TVM_BIND_THREADS="1") == ["7 1"]


@pytest.mark.parametrize(
    ("text", "cpus"), [("max 100000\n", None), ("150000 100000\n", 2), ("50000 100000\n", 1), (None, None)]
)
def test_a_cgroups_quota_limits_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, cpus: int | None
) -> None:
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert machine.cpu_quota() == cpus
    assert usable_cpus() == min(cpus or 1024, len(os.sched_getaffinity(0)))


def test_threads_that_help_a_gpu_leave_a_cpu_to_each_that_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "default_threads", lambda: 16)
    assert (threads.helper_threads(), threads.helper_threads(fed=True)) == (15, 14)
    assert (threads.helper_threads(3, fed=True), threads.helper_threads(0)) == (3, 0)
    monkeypatch.setattr(threads, "default_threads", lambda: 2)
    assert threads.helper_threads(fed=True) == 1
