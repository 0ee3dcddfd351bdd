"""One answer at the end, or a stream of its pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse, Response

from moec.runtime.serving.answers.layouts import usage
from moec.runtime.serving.answers.pieces import pieces, unless_disconnected
from moec.runtime.serving.answers.streams import DONE, EventStream, event
from moec.runtime.serving.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from fastapi import Request as HttpRequest

    from moec.runtime.serving.answers.choices import Choice, Piece
    from moec.runtime.serving.answers.layouts import Answer
    from moec.runtime.serving.asked.bodies import Generation
    from moec.runtime.serving.asked.requests import Asked
    from moec.runtime.serving.service import Service

CLIENT_CLOSED_REQUEST = 499
"""Of a response that nobody reads, for the log and the metrics (nginx's)."""


async def respond(
    service: Service,
    request: HttpRequest,
    body: Generation,
    asked: Asked,
    choices: Sequence[Choice],
    answer: Answer,
    before: Callable[[], Awaitable[None]] | None = None,
) -> Response:
    """Run what is asked for and lay out the answer, after ``before`` where there is such a thing.

    Raises:
        ApiError: there is no room for it, or the model failed before anything was sent.
    """
    ticket = service.admission.enter(asked.requests)
    timer = service.metrics.begin(len(choices))
    running = pieces(ticket, choices, timer, before)
    if body.stream:
        counted = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(ticket, _events(running, choices, answer, asked if counted else None))
    try:
        whole = await unless_disconnected(request, _whole(running, choices, answer, asked))
    finally:
        ticket.close()
    return Response(status_code=CLIENT_CLOSED_REQUEST) if whole is None else JSONResponse(whole)


async def _whole(
    running: AsyncIterator[Piece], choices: Sequence[Choice], answer: Answer, asked: Asked
) -> dict[str, Any]:
    gathered: list[list[Piece]] = [[] for _ in choices]
    async for piece in running:
        gathered[piece.index].append(piece)
    return answer.envelope | {
        "choices": [answer.whole(own) for own in gathered],
        "usage": _usage(asked, choices),
    }


async def _events(
    running: AsyncIterator[Piece], choices: Sequence[Choice], answer: Answer, counted: Asked | None
) -> AsyncIterator[str]:
    """The stream; with what is ``counted`` it ends with the usage."""
    envelope = answer.chunk_envelope
    rest = {} if counted is None else {"usage": None}
    for opening in answer.openings:
        yield event(envelope | {"choices": [opening]} | rest)
    try:
        async for piece in running:
            yield event(envelope | {"choices": [answer.delta(piece)]} | rest)
        if counted is not None:
            yield event(envelope | {"choices": [], "usage": _usage(counted, choices)})
    except ApiError as error:
        yield event(error.body)
    yield DONE


def _usage(asked: Asked, choices: Sequence[Choice]) -> dict[str, Any]:
    """What ended choices took: a prompt counts once, however many choices it has."""
    first = range(0, len(choices), asked.n)
    return usage(
        sum(map(len, asked.prompts)),
        sum(min(choice.reused for choice in choices[start : start + asked.n]) for start in first),
        sum(choice.tokens for choice in choices),
    )
