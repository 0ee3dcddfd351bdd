"""Errors as OpenAI's API words them: ``{"error": {"message", "type", "param", "code"}}``, with a status."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from moec.errors import MoecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.exceptions import HTTPException as FrameworkError

RETRY_SECONDS = "1"
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Of statuses that have one of their own."""


class ApiError(HTTPException):
    """What a client gets instead of an answer.

    Args:
        status: of the response.
        message: for a person.
        param: the field of the request that is wrong.
        code: for a program.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers) if headers else None)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """Of the response."""
        return error_body(self.status_code, str(self.detail), self.param, self.code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON that says what is wrong."""
    # Lone surrogates, which JSON can write and UTF-8 cannot.
    message = message.encode(errors="backslashreplace").decode()
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: FrameworkError) -> JSONResponse:
    """The response for an error of ours, or of the framework (no such path, another method)."""
    body = error.body if isinstance(error, ApiError) else error_body(error.status_code, str(error.detail))
    return JSONResponse(body, error.status_code, error.headers)


def refused(error: MoecError, *, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be run, in the words of the error that says so."""
    return ApiError(400, _one_line(str(error)), param=param, code=code)


def busy(why: str) -> ApiError:
    """For who may come again in a moment."""
    return ApiError(
        429,
        _one_line(f"{why} Try again."),
        code="rate_limit_exceeded",
        headers={"Retry-After": RETRY_SECONDS},
    )


def failed(error: Exception) -> ApiError:
    """A request whose step failed; what is not one of moec's own errors stays in the server's log."""
    why = _one_line(str(error)) if isinstance(error, MoecError) else "The server's log says why."
    return ApiError(500, f"The model failed while it ran this request. {why}", code="step_failed")


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


def malformed(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """A body that is not what the endpoint takes; ``problems`` are pydantic's, of which the first is told."""
    problem = problems[0]
    place = [str(part) for part in problem["loc"] if part != "body"]
    param = ".".join(place) or None
    match problem["type"]:
        case "json_invalid":
            return ApiError(400, f"The body is no JSON: {problem['ctx']['error']}.")
        case "extra_forbidden":
            return ApiError(
                400,
                f"Unrecognized request argument supplied: {param}",
                param=param,
                code="unknown_parameter",
            )
        case "missing" if place:
            return ApiError(
                400,
                f"Missing required parameter: {param}",
                param=param,
                code="missing_required_parameter",
            )
    message = str(problem["msg"]).removeprefix("Value error, ")
    where = f"{param}: " if param else "The body must be JSON, sent as application/json: "
    return ApiError(400, where + message, param=param, code="invalid_value" if param else None)
