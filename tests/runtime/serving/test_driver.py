from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from moec.errors import DeviceError, RequestError
from moec.runtime.engine import Request
from moec.runtime.serving.driver import FAILURES_IN_A_ROW, Driver, Event, Failure, Job, Token
from tests.support.byte_tokenizer import bytes_tokenizer
from tests.support.served import PAGES, executor_of, make_model
from tests.support.waiting import HANG_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.served import ScriptedExecutor


@dataclass(eq=False)
class FakeJob:
    requests: list[Request]


def job(*prompts: str, tokens: int = 20) -> FakeJob:
    encode = bytes_tokenizer().encode
    return FakeJob([Request(tuple(encode(prompt).ids), tokens) for prompt in prompts])


class Bench:
    """A driver whose `run` a test calls in this thread; it stops once a condition holds."""

    def __init__(self, folder: Path) -> None:
        self.model = make_model(folder, "abc")
        self.events: list[tuple[Job, Event]] = []
        self.driver = Driver(self.model.engine, self._deliver)
        self.enough: Callable[[], bool] = lambda: False

    @property
    def executor(self) -> ScriptedExecutor:
        return executor_of(self.model)

    def _deliver(self, events: list[tuple[Job, Event]]) -> None:
        self.events += events
        if self.enough():
            self.driver.stop()

    def run(self) -> None:
        """Until the driver is stopped, or for too long: then the test fails."""
        timer = threading.Timer(HANG_SECONDS, self.driver.stop)
        timer.start()
        try:
            self.driver.run()
            assert timer.is_alive(), "what the test waits for does not happen"
        finally:
            timer.cancel()

    def of(self, owner: Job) -> list[Event]:
        return [event for job, event in self.events if job is owner]

    def tokens(self, owner: Job, index: int = 0) -> str:
        ids = [event.token for event in self.of(owner) if isinstance(event, Token) and event.index == index]
        return bytes_tokenizer().decode(ids)

    def assert_free(self) -> None:
        assert self.model.engine.scheduler.pages.free == PAGES
        assert not self.model.engine.busy


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_tokens_of_jobs_that_run_together_come_to_each(bench: Bench) -> None:
    one, two = job("x=", "y=a"), job("zz=")
    bench.enough = lambda: sum(len(bench.of(each)) for each in (one, two)) == 60
    bench.driver.submit(one)
    bench.driver.submit(two)
    bench.run()
    for owner, index, first in ((one, 0, "abc"), (one, 1, "bc"), (two, 0, "abc")):
        assert bench.tokens(owner, index).startswith(first)
    last = [event for event in bench.of(one) if isinstance(event, Token) and event.finished]
    assert sorted(event.index for event in last) == [0, 1]
    bench.assert_free()


def test_a_cancelled_job_frees_its_pages_and_gets_nothing_more(bench: Bench) -> None:
    one, two = job("x=", "y="), job("z=", tokens=60)
    bench.enough = lambda: bench.tokens(two).count("c") == 9
    bench.driver.submit(one)
    bench.driver.submit(two)
    plain = bench._deliver

    def cancelling(events: list[tuple[Job, Event]]) -> None:
        plain(events)
        if len(bench.of(one)) == 6:
            bench.driver.cancel(one, 0)
        if len(bench.of(one)) == 9:
            bench.driver.cancel(one)

    bench.driver._deliver = cancelling
    bench.run()
    # The event of the step that runs when it is cancelled is the last.
    indices = [event.index for event in bench.of(one) if isinstance(event, Token)]
    assert indices == [0, 1, 0, 1, 0, 1, 1, 1, 1]
    bench.assert_free()


def test_a_step_that_fails_fails_what_is_in_it_and_the_next_goes_on(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    inside = [job(f"{n}=") for n in range(4)]
    waiting = job("w=")
    bench.executor.failures = [ValueError("no")]
    for each in (*inside, waiting):
        bench.driver.submit(each)
    bench.enough = lambda: len(bench.of(waiting)) == 20
    bench.run()
    for each in inside:
        assert [type(event) for event in bench.of(each)] == [Failure]
    assert bench.tokens(waiting).startswith("abc")
    assert "A step failed" in caplog.text
    bench.assert_free()


@pytest.mark.parametrize("error", [ValueError("no"), DeviceError("gone")])
def test_a_driver_gives_up(bench: Bench, error: Exception) -> None:
    steps = 1 if isinstance(error, DeviceError) else FAILURES_IN_A_ROW
    bench.executor.failures = [error] * steps
    jobs = [job("a=", "b=", "c=", "d=") for _ in range(steps + 1)]
    for each in jobs:
        bench.driver.submit(each)
    with pytest.raises(type(error)):
        bench.run()
    late = job("late=")
    bench.driver.submit(late)
    for each in (*jobs, late):
        (event,) = bench.of(each)
        assert isinstance(event, Failure)
        assert event.error is error
    with pytest.raises(type(error)):
        bench.driver.call(lambda: 1).result(HANG_SECONDS)
    bench.assert_free()


def test_failures_that_are_not_in_a_row_are_survived(bench: Bench) -> None:
    failures = [ValueError("no")] * (FAILURES_IN_A_ROW - 1)
    bench.executor.failures = [*failures, None, *failures]
    failing = [job("a=", "b=", "c=", "d=") for _ in range(2 * len(failures))]
    good = job("g=")
    for each in (*failing, good):
        bench.driver.submit(each)
    bench.enough = lambda: len(bench.of(good)) == 20
    bench.run()
    for each in failing:
        assert isinstance(bench.of(each)[-1], Failure)


def test_a_request_that_the_engine_refuses_fails_its_job_alone(bench: Bench) -> None:
    good, bad = job("a="), FakeJob([*job("b=").requests, Request((), 5)])
    bench.driver.submit(bad)
    bench.driver.submit(good)
    bench.enough = lambda: len(bench.of(good)) == 20
    bench.run()
    (event,) = bench.of(bad)
    assert isinstance(event, Failure)
    assert isinstance(event.error, RequestError)
    bench.assert_free()


def test_calls_are_made_between_steps_and_their_errors_come_back(bench: Bench) -> None:
    thread = threading.Thread(target=bench.driver.run)
    thread.start()
    assert bench.driver.call(threading.get_ident).result(HANG_SECONDS) == thread.ident

    def broken() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        bench.driver.call(broken).result(HANG_SECONDS)
    bench.driver.stop()
    thread.join(HANG_SECONDS)
    assert not thread.is_alive()


def test_a_call_that_nobody_waits_for_any_more_does_not_keep_others_from_their_failures(bench: Bench) -> None:
    left = job("a=", tokens=60)

    def leave() -> bool:
        bench.driver.call(lambda: 1).cancel()
        return True

    bench.enough = leave
    bench.driver.submit(left)
    bench.run()
    assert isinstance(bench.of(left)[-1], Failure)
    bench.assert_free()
