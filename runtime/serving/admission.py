"""Who is let in: as many requests as run together, and a bounded number that wait."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from moec.runtime.serving.errors import RETRY_SECONDS, ApiError, busy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moec.runtime.engine import Request
    from moec.runtime.serving.driver import Driver, Event, Job


class Ticket:
    """The place of a client that was let in: its requests, and their events as they come. Close it, whatever happens.

    Attributes:
        requests: of the engine.
        events: of all of them.
    """

    def __init__(self, admission: Admission, requests: Sequence[Request]) -> None:
        self._admission = admission
        self._closed = False
        self.requests = requests
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    def start(self) -> None:
        """Let the requests join those that run."""
        self._admission.driver.submit(self)

    def cancel(self, index: int) -> None:
        """End one of the requests."""
        self._admission.driver.cancel(self, index)

    def close(self) -> None:
        """End what still runs, and let others in."""
        if not self._closed:
            self._closed = True
            self._admission.leave(self)


class Admission:
    """Counts requests of the engine, a choice of an answer each. Used by the event loop's thread alone.

    Args:
        driver: runs them.
        running: how many the engine runs together.
        waiting: how many may wait besides.

    Attributes:
        stopping: whether nobody is let in any more.
    """

    def __init__(self, driver: Driver, running: int, waiting: int) -> None:
        self.driver = driver
        self.stopping = False
        self._capacity = running + waiting
        self._tickets: set[Ticket] = set()
        self._left = asyncio.Event()

    def enter(self, requests: Sequence[Request]) -> Ticket:
        """Let a client in.

        Raises:
            ApiError: the server is stopping, or they are too many, now or ever.
        """
        if self.stopping:
            raise stopping_error()
        if len(requests) > self._capacity:
            raise ApiError(
                400,
                f"The request asks for {len(requests)} choices at once; this server takes {self._capacity}.",
                param="n",
            )
        if sum(len(ticket.requests) for ticket in self._tickets) + len(requests) > self._capacity:
            raise busy(f"The server has {self._capacity} choices to generate, as many as it takes.")
        ticket = Ticket(self, requests)
        self._tickets.add(ticket)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Called by `Ticket.close`."""
        self._tickets.remove(ticket)
        self.driver.cancel(ticket)
        self._left.set()

    async def empty(self) -> None:
        """Wait until all have left."""
        while self._tickets:
            self._left.clear()
            await self._left.wait()

    def tell(self, event: Event) -> None:
        """Put an event before all that are in."""
        for ticket in self._tickets:
            ticket.events.put_nowait(event)


def stopping_error() -> ApiError:
    """For who comes, or has to go, while the server stops."""
    return ApiError(
        503, "The server is stopping.", code="shutting_down", headers={"Retry-After": RETRY_SECONDS}
    )


def dispatch(events: Iterable[tuple[Job, Event]]) -> None:
    """Give each event to its ticket."""
    for job, event in events:
        assert isinstance(job, Ticket)
        job.events.put_nowait(event)
