"""From a client's ticket to the pieces of its answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from moec.runtime.serving.driver import Failure
from moec.runtime.serving.errors import ApiError, failed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from typing import TypeVar

    from fastapi import Request as HttpRequest

    from moec.runtime.serving.admission import Ticket
    from moec.runtime.serving.answers.choices import Choice, Piece
    from moec.runtime.serving.metrics import Timer

    Result = TypeVar("Result")


async def pieces(
    ticket: Ticket, choices: Sequence[Choice], timer: Timer, before: Callable[[], Awaitable[None]] | None
) -> AsyncIterator[Piece]:
    """Text as it becomes certain, of all choices as they come, until each has ended.

    Args:
        ticket: theirs; its requests join now.
        choices: of the answer.
        timer: told of the tokens.
        before: what is done first.

    Raises:
        ApiError: the model failed, or the server stops.
    """
    if before is not None:
        await before()
    ticket.start()
    left = len(choices)
    while left:
        event = await ticket.events.get()
        if isinstance(event, Failure):
            raise event.error if isinstance(event.error, ApiError) else failed(event.error)
        timer.token(event.index)
        choice = choices[event.index]
        if choice.finish is not None:
            continue
        piece = choice.push(event)
        if choice.stopped:
            ticket.cancel(event.index)
        left -= choice.finish is not None
        if piece is not None:
            yield piece
    timer.end()


async def unless_disconnected(request: HttpRequest, work: Awaitable[Result]) -> Result | None:
    """The result of ``work``; ``None``, and the work cancelled, where the client goes away first."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
