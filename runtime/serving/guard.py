"""What every request passes first: the key, and the limit on its body."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from moec.runtime.serving.errors import ApiError, error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from moec.runtime.serving.metrics import Metrics

OPEN_PATHS = ("/health",)
"""Need no key."""


class Guard:
    """Refuses requests without the key and those whose body is too large; counts all.

    Args:
        app: what it guards.
        api_key: what clients must send as ``Authorization: Bearer``; ``None``: nothing.
        max_body_bytes: of a request.
        metrics: get each response's status.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int, metrics: Metrics) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Of paths that nobody serves there is no end.
                path = scope["route"].path if "route" in scope else "other"
                self._metrics.answered(path, message["status"])
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await error_response(error)(scope, receive, noted)
            return
        await self._app(scope, self._counted(receive), noted)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._expected is not None and scope["path"] not in OPEN_PATHS:
            # As bytes again: Starlette reads headers as Latin-1, clients write keys in UTF-8.
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                raise ApiError(
                    401,
                    "The API key is missing or wrong. Send it as Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise self._too_large()

    def _counted(self, receive: Receive) -> Receive:
        """``receive``, which ends with an error where the body is longer than it said."""
        left = self._max_body_bytes

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The body is larger than {self._max_body_bytes} bytes.",
            code="request_too_large",
            headers={"Connection": "close"},
        )
