"""Drives the engine: one thread steps it, and others hand it requests and get tokens back."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from moec.errors import DeviceError, MoecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from moec.runtime.engine import Engine, Request
    from moec.runtime.engine import Sequence as RunningSequence
    from moec.runtime.engine.sequence import FinishReason
    from moec.runtime.logprobs import TokenLogprobs

    Result = TypeVar("Result")

FAILURES_IN_A_ROW = 3
"""So many failed steps without a good one between them, and the driver gives up."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Token:
    """A new token of a request of a job."""

    index: int
    """Of the request within the job."""
    token: int
    logprobs: TokenLogprobs | None
    finished: FinishReason | None
    """Set with the last one."""
    reused: int
    """Tokens of the request's prompt that were in the cache already."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A job's requests do not run any more; no token follows."""

    error: Exception


Event = Token | Failure


class Job(Protocol):
    """Requests that belong together."""

    @property
    def requests(self) -> Sequence[Request]:
        """They have been checked: the engine takes them."""
        ...


@dataclass(frozen=True, slots=True)
class _Add:
    job: Job


@dataclass(frozen=True, slots=True)
class _Cancel:
    job: Job
    index: int | None


@dataclass(frozen=True, slots=True)
class _Call:
    function: Callable[[], Any]
    future: Future[Any]


class Driver:
    """Steps an engine while there is something to do.

    `run` is for the thread that the model belongs to. All other methods are for any thread, and return at once: what
    they ask is done before the next step.

    Args:
        engine: of the model; nobody else calls it.
        deliver: gets the events of a step, each with its job, in the thread of `run`.
    """

    def __init__(self, engine: Engine, deliver: Callable[[list[tuple[Job, Event]]], object]) -> None:
        self._engine = engine
        self._deliver = deliver
        self._inbox: SimpleQueue[_Add | _Cancel | _Call | None] = SimpleQueue()
        self._sequences: dict[RunningSequence, tuple[Job, int]] = {}
        self._failures = 0
        self._stopping = False
        self._closed: Exception | None = None

    def submit(self, job: Job) -> None:
        """Let the job's requests join."""
        self._put(_Add(job))

    def cancel(self, job: Job, index: int | None = None) -> None:
        """End the job's requests, or one of them, where they have not ended; their pages are free."""
        self._put(_Cancel(job, index))

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Call a function that looks at the model, between two steps."""
        future: Future[Result] = Future()
        self._put(_Call(function, future))
        return future

    def stop(self) -> None:
        """Let `run` return before the next step; jobs that are left fail."""
        self._stopping = True
        self._put(None)

    def run(self) -> None:
        """Step until `stop` is called.

        Raises:
            MoecError: the device failed, or several steps in a row.
        """
        reason: Exception = RuntimeError("the engine was stopped")
        try:
            while not self._stopping:
                self._read_inbox()
                if not self._stopping and self._engine.busy:
                    self._step()
        except Exception as error:
            reason = error
            raise
        finally:
            self._closed = reason
            self._refuse_inbox()
            self._fail(list(self._sequences), reason)

    def _put(self, item: _Add | _Cancel | _Call | None) -> None:
        self._inbox.put(item)
        if self._closed is not None:
            self._refuse_inbox()

    def _read_inbox(self) -> None:
        """Do what was asked; wait for something where there is no step to run."""
        item = None if self._engine.busy else self._inbox.get()
        while True:
            match item:
                case _Add(job):
                    self._add(job)
                case _Cancel(job, index):
                    self._cancel(job, index)
                case _Call():
                    _call(item)
            try:
                item = self._inbox.get_nowait()
            except Empty:
                return

    def _add(self, job: Job) -> None:
        try:
            for index, request in enumerate(job.requests):
                self._sequences[self._engine.add(request)] = (job, index)
        except MoecError as error:
            self._cancel(job, None)
            self._deliver([(job, Failure(error))])

    def _cancel(self, job: Job, index: int | None) -> None:
        for sequence, (owner, place) in list(self._sequences.items()):
            if owner is job and index in (None, place):
                self._engine.cancel(sequence)
                del self._sequences[sequence]

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except Exception as error:
            log.exception("A step failed; so do the requests in it.")
            self._fail(list(self._engine.scheduler.running), error)
            self._failures += 1
            if isinstance(error, DeviceError) or self._failures == FAILURES_IN_A_ROW:
                raise
            return
        self._failures = 0
        events: list[tuple[Job, Event]] = []
        for output in outputs:
            sequence = output.sequence
            job, index = self._sequences[sequence]
            events.append(
                (job, Token(index, output.token, output.logprobs, sequence.finished, sequence.reused or 0))
            )
            if sequence.finished is not None:
                del self._sequences[sequence]
        if events:
            self._deliver(events)

    def _fail(self, sequences: Iterable[RunningSequence], error: Exception) -> None:
        """Fail the jobs of ``sequences`` as a whole."""
        jobs = {id(job): job for job, _ in (self._sequences[sequence] for sequence in sequences)}
        for job in jobs.values():
            self._cancel(job, None)
        if jobs:
            self._deliver([(job, Failure(error)) for job in jobs.values()])

    def _refuse_inbox(self) -> None:
        """Answer what nobody will do any more."""
        assert self._closed is not None
        while True:
            try:
                item = self._inbox.get_nowait()
            except Empty:
                return
            match item:
                case _Add(job):
                    self._deliver([(job, Failure(self._closed))])
                case _Call(_, future):
                    if future.set_running_or_notify_cancel():
                        future.set_exception(self._closed)


def _call(item: _Call) -> None:
    if item.future.set_running_or_notify_cancel():
        try:
            item.future.set_result(item.function())
        except Exception as error:  # noqa: BLE001 whoever waits for the future gets it
            item.future.set_exception(error)
