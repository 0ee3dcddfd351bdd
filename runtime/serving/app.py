"""The endpoints."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as FrameworkError

from moec.runtime.serving.answers.choices import Choice
from moec.runtime.serving.answers.completions import completion_choices, score_prompts
from moec.runtime.serving.answers.layouts import ChatAnswer, CompletionAnswer
from moec.runtime.serving.answers.responses import respond
from moec.runtime.serving.asked.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from moec.runtime.serving.asked.requests import ask
from moec.runtime.serving.errors import ApiError, error_response, malformed
from moec.runtime.serving.guard import Guard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.runtime.serving.service import Service


def create_app(
    service: Service, *, api_key: str | None, max_body_bytes: int, allow_origins: Sequence[str]
) -> FastAPI:
    """The server's application.

    Args:
        service: the model.
        api_key: that clients need; ``None``: none.
        max_body_bytes: of a request.
        allow_origins: of web pages that may use the server; ``*``: all.
    """
    app = FastAPI(title="moec", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_key=api_key, max_body_bytes=max_body_bytes, metrics=service.metrics)
    if allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(allow_origins), allow_methods=["*"], allow_headers=["*"]
        )
    _add_error_handlers(app)
    _add_generation(app, service)
    _add_tokenizer(app, service)
    _add_state(app, service)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    engine, model, tokenizer = service.model.engine, service.model.record, service.tokenizer

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: HttpRequest) -> Response:
        service.check_name(body.model)
        ids = await asyncio.to_thread(service.encode_chat, body.messages, body.chat_template_kwargs)
        asked = ask(engine, model, body, [ids])
        choices = [Choice(index, tokenizer.stream(), body.stops) for index in range(asked.n)]
        answer = ChatAnswer(service.name, tokenizer, asked.n, scored=body.scored is not None)
        return await respond(service, request, body, asked, choices, answer)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: HttpRequest) -> Response:
        service.check_name(body.model)
        prompts = await asyncio.to_thread(lambda: [service.encode(prompt) for prompt in body.prompts])
        asked = ask(engine, model, body, prompts)
        choices = completion_choices(service, body, asked)
        answer = CompletionAnswer(service.name, tokenizer, scored=body.scored is not None)
        before = None
        if body.echo and body.scored is not None:
            before = partial(score_prompts, service, asked, choices, body.scored)
        return await respond(service, request, body, asked, choices, answer, before)


def _add_tokenizer(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        service.check_name(body.model)
        if body.messages is not None:
            ids = await asyncio.to_thread(service.encode_chat, body.messages, None)
        else:
            ids = await asyncio.to_thread(service.encode, body.prompt or "", body.add_special_tokens)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.model.record.max_context}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        service.check_name(body.model)
        return {"prompt": service.decode(body.tokens)}


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        stopping = service.admission.stopping
        return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.describe()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_name(name)
        return service.describe()

    @app.get("/metrics")
    async def metrics() -> Response:
        text = service.metrics.render(service.model.engine, await service.stats())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(FrameworkError)
    async def known(_: HttpRequest, error: FrameworkError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> Response:
        return error_response(malformed(error.errors()))

    @app.exception_handler(Exception)
    async def unknown(_: HttpRequest, __: Exception) -> Response:
        return error_response(ApiError(500, "The server failed; its log says why.", code="internal_error"))
