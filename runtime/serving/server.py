"""A model served until it is told to stop: the engine in this thread, HTTP in another."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn

from moec.errors import NetworkError
from moec.runtime.serving.admission import Admission, dispatch, stopping_error
from moec.runtime.serving.app import create_app
from moec.runtime.serving.driver import Driver, Failure
from moec.runtime.serving.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fastapi import FastAPI

    from moec.runtime.model import Model
    from moec.runtime.tokenizer import Tokenizer

FAREWELL_SECONDS = 5
"""For responses to reach their clients once the last token is there."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Options:
    """How a model is served; docs/serving.md says what each means."""

    name: str
    api_key: str | None = None
    max_waiting: int = 64
    max_body_bytes: int = 4 << 20
    grace_seconds: float = 30.0
    allow_origins: Sequence[str] = ()
    log_requests: bool = False
    """By the logger ``uvicorn.access``."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; nobody is let in before `Server.run` listens.

    Raises:
        NetworkError: the address is taken, or none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise _no_address(host, port, error) from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _no_address(host, port, error) from error
    return bound


def _no_address(host: str, port: int, error: OSError | UnicodeError) -> NetworkError:
    why = error.strerror if isinstance(error, OSError) else "This is no name of a host"
    return NetworkError(f"Cannot listen at {host}, port {port}.", f"{why}.", "Give another --host or --port.")


class _Http(uvicorn.Server):
    """Says when it listens."""

    on_started: Callable[[], object]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()


@contextmanager
def stopped_by_signals(server: Server) -> Iterator[None]:
    """Let SIGINT and SIGTERM stop it; for the main thread."""
    before = {number: signal.signal(number, lambda *_: server.stop()) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Server:
    """Serves a model. Made in the thread that loaded it, which then calls `run`.

    Args:
        model: stays open.
        tokenizer: of its bundle.
        options: see there.
        listener: from `bind`; closed at the end.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, options: Options, listener: socket.socket) -> None:
        self._loop = asyncio.new_event_loop()
        self._listener = listener
        self._grace_seconds = options.grace_seconds
        self._driver = Driver(model.engine, lambda events: self._loop.call_soon_threadsafe(dispatch, events))
        self._admission = Admission(self._driver, model.engine.limits.max_batch, options.max_waiting)
        service = Service(options.name, model, tokenizer, self._admission)
        self.app: FastAPI = create_app(
            service,
            api_key=options.api_key,
            max_body_bytes=options.max_body_bytes,
            allow_origins=options.allow_origins,
        )
        self._http = _Http(
            uvicorn.Config(
                self.app,
                log_config=None,
                access_log=options.log_requests,
                lifespan="off",
                timeout_graceful_shutdown=FAREWELL_SECONDS,
            )
        )
        self._stop_wanted = asyncio.Event()
        self._hurry = asyncio.Event()
        self._driven = threading.Event()
        """Whether the driver has ended: nothing is given to the loop any more."""
        self._failure: BaseException | None = None

    def stop(self) -> None:
        """Let nobody in any more, let what runs end within the grace period, then end; again: end at once.

        For any thread, and for handlers of signals.
        """
        # The loop is closed where a signal comes at the very end.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._note_stop)

    def run(self, started: Callable[[], object]) -> None:
        """Serve until `stop` is called.

        Args:
            started: called once requests are let in, in another thread.

        Raises:
            MoecError: the model failed for good.
        """
        thread = threading.Thread(target=self._serve, args=(started,), name="http")
        thread.start()
        try:
            self._driver.run()
        finally:
            self._loop.call_soon_threadsafe(self._end)
            self._driven.set()
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _serve(self, started: Callable[[], object]) -> None:
        """The whole of the HTTP thread."""
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._listen(started))
            except BaseException as error:  # noqa: BLE001 `run` raises it
                self._failure = error
            finally:
                self._driver.stop()
                self._driven.wait()

    async def _listen(self, started: Callable[[], object]) -> None:
        stopping = asyncio.ensure_future(self._stop_gently())
        self._http.on_started = started
        await self._http.serve(sockets=[self._listener])
        stopping.cancel()

    def _note_stop(self) -> None:
        if self._stop_wanted.is_set():
            self._hurry.set()
        self._stop_wanted.set()

    async def _stop_gently(self) -> None:
        await self._stop_wanted.wait()
        self._admission.stopping = True
        empty, hurry = (asyncio.ensure_future(task) for task in (self._admission.empty(), self._hurry.wait()))
        await asyncio.wait({empty, hurry}, timeout=self._grace_seconds, return_when=asyncio.FIRST_COMPLETED)
        self._admission.tell(Failure(stopping_error()))
        self._end()

    def _end(self) -> None:
        self._admission.stopping = True
        self._http.should_exit = True
