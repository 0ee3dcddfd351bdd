"""Teams of threads: their sleep, their end, and what they say when something fails."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi

from moec.artifacts.model import ExpertBody
from moec.artifacts.words import mailbox
from moec.errors import DeviceError
from moec.runtime.machine.libraries import load_runtime
from moec.runtime.sharing import team as teams
from moec.runtime.sharing import watchers
from moec.runtime.sharing.team import SharedLayer, Team
from moec.runtime.tensors import aligned_zeros
from tests.support.made_once import made_once
from tests.support.mailboxes import HostBox
from tests.support.waiting import HANG_SECONDS, wait_until

HIDDEN, INTERMEDIATE = 16, 8
BODY = ExpertBody("b", HIDDEN, INTERMEDIATE, False, False, False, "up", "float32")


@cache
def kernel() -> Callable[..., None]:
    """Read from a file, so that programs that tests start need no compiler."""
    load_runtime(None)
    library = tvm_ffi.load_module(str(made_once("serving-loop", _compile) / "serve.so"))
    found: Callable[..., None] = library[mailbox.SERVE]
    return found


def _compile(folder: Path) -> None:
    from moec.compiler.kernels.cpu.serve import serve
    from moec.compiler.lowering.link import link
    from tests.support.machine_code import machine_code

    code = machine_code(serve([BODY], lanes=4, machine="x86_64"))
    code.export_library(str(folder / "serve.so"), fcompile=link)


class Case:
    def __init__(self, serve: Callable[..., None], threads: int) -> None:
        self.host = HostBox(HIDDEN, 1)
        self.table = aligned_zeros((1,), np.int64)
        # up is [I, H] of 1, down [H, I] of 2
        self.expert = aligned_zeros((2 * HIDDEN * INTERMEDIATE,), np.float32)
        self.expert[: HIDDEN * INTERMEDIATE], self.expert[HIDDEN * INTERMEDIATE :] = 1, 2
        self.table[0] = self.expert.ctypes.data
        layers = [SharedLayer(self.table.ctypes.data, 1, 1, 0, INTERMEDIATE)]
        self.team = Team(serve, self.host.box, layers, threads)

    def post(self) -> None:
        one = np.ones((1, 1))
        self.host.post(0, np.ones((1, HIDDEN), np.float32), 0 * one.astype(np.int64), one.astype(np.float32))

    def ask(self) -> None:
        self.post()
        assert (self.host.collect(1) == HIDDEN * INTERMEDIATE * 2).all()


@pytest.fixture
def case() -> Iterator[Case]:
    case = Case(kernel(), 2)
    yield case
    case.team.close()


def expert_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("moec-expert")]


def states(team: Team) -> set[str]:
    """What the system says of the team's threads: R runs or could run, S sleeps."""
    files = [Path(f"/proc/self/task/{thread.native_id}/stat") for thread in team._threads]
    return {file.read_text().rpartition(")")[2].split()[0] for file in files}


def await_sleep(team: Team) -> None:
    wait_until(lambda: states(team) == {"S"})


def test_threads_sleep_between_steps_and_wake_for_the_next(case: Case) -> None:
    for _ in range(3):
        case.team.begin()
        case.ask()
        case.team.end()
        await_sleep(case.team)
    case.team.check()


def test_threads_stay_awake_within_a_step(case: Case) -> None:
    case.team._state.control[mailbox.SPINS] = 10
    case.team._state.control[mailbox.WATCHES] = 1 << 40
    await_sleep(case.team)
    case.team.begin()

    def awake() -> bool:
        time.sleep(0.005)
        return states(case.team) == {"R"}

    # Some are not awake at once; ones that nap are never seen awake so often in a row.
    wait_until(lambda: all(awake() for _ in range(20)))
    case.ask()


def test_threads_nap_in_a_step_that_asks_for_nothing(case: Case) -> None:
    """As one does that was begun ahead for a sequence that has ended: it is never waited for."""
    control = case.team._state.control
    control[mailbox.SPINS], control[mailbox.WATCHES] = 10, 10
    case.team.begin()
    case.ask()
    await_sleep(case.team)
    case.ask()
    case.team.end()
    case.team.check()


def test_a_step_may_begin_twice_and_end_twice(case: Case) -> None:
    for _ in range(2):
        case.team.begin()
        case.team.begin()
        case.ask()
        case.team.end()
        case.team.end()


@pytest.mark.parametrize("asleep", [False, True])
def test_closing_ends_the_threads(asleep: bool) -> None:
    case = Case(kernel(), 3)
    case.team.begin()
    case.ask()
    if asleep:
        case.team.end()
        await_sleep(case.team)
    case.team.close()
    case.team.close()
    assert not expert_threads()
    assert case.host.box.words[mailbox.ABORT] == 1


def test_letting_go_of_a_team_ends_its_threads() -> None:
    case = Case(kernel(), 2)
    assert len(expert_threads()) == 2
    del case.team
    assert not expert_threads()


def test_a_thread_that_fails_at_once_is_an_error_of_the_start() -> None:
    def serve(*_: Any) -> None:
        raise RuntimeError("no such instruction")

    with pytest.raises(DeviceError, match="no such instruction"):
        Case(serve, 2)
    assert not expert_threads()


def test_a_thread_that_fails_later_aborts_and_says_so() -> None:
    def serve(words: Any, *others: Any) -> None:
        kernel()(words, *others)
        raise RuntimeError("ran off the end")

    case = Case(serve, 1)
    control = case.team._state.control
    control[mailbox.STOP] = 1
    case.team.begin()
    wait_until(lambda: bool(case.host.box.words[mailbox.ABORT]))
    with pytest.raises(DeviceError, match="ran off the end"):
        case.team.check()
    case.team.close()


def test_a_request_that_the_gpu_gave_up_is_an_error(case: Case) -> None:
    case.host.box.words[mailbox.FAILED] = 12
    with pytest.raises(DeviceError, match="request 12"):
        case.team.check()


def test_a_new_team_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(kernel(), 1)
    case.team.begin()
    case.ask()
    case.team.close()
    case.host.number = 0
    layers = [SharedLayer(case.table.ctypes.data, 1, 1, 0, INTERMEDIATE)]
    case.team = Team(kernel(), case.host.box, layers, 1)
    case.team.begin()
    case.ask()
    case.team.check()
    case.team.close()


def test_many_requests_with_more_threads_than_cores_and_pieces_than_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchers, "SPINS", 10)
    monkeypatch.setattr(teams, "CHUNKS_PER_THREAD", 9)
    case = Case(kernel(), 6)
    for _ in range(40):
        case.team.begin()
        case.ask()
        case.team.end()
    case.team.close()


@pytest.mark.parametrize("how", ["pass", "raise KeyboardInterrupt", "os._exit(0)", "sys.exit(0)"])
def test_a_program_ends_with_a_team_at_work(how: str) -> None:
    program = textwrap.dedent(f"""
        import os, sys
        from tests.runtime.test_sharing import Case, kernel
        case = Case(kernel(), 2)
        case.team.begin()
        case.ask()
        {how}
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    expected = 130 if "Interrupt" in how else 0
    assert done.returncode in (expected, -2 if expected else 0), done.stderr[-2000:]
