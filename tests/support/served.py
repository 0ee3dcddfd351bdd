"""A server in this process, over an engine whose model says what it is told to say."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.model import GenerationDefaults
from moec.runtime.engine import Engine, Limits
from moec.runtime.memory.budget import MemoryPlan
from moec.runtime.model import Model
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.serving.server import Options, Server, bind
from moec.runtime.stats import Stats
from moec.runtime.tokenizer import Tokenizer
from tests.support import byte_tokenizer, fake_chain
from tests.support.fake_executor import FakeExecutor
from tests.support.waiting import HANG_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from moec.runtime.engine.batch import StepBatch
    from moec.runtime.engine.sequence import Sequence

NAME = "fake"
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]={{ mood }}"
DEFAULTS = GenerationDefaults(None, (byte_tokenizer.END,), None, False, 1.0, 0, 1.0, 1.0)
CONTEXT, PAGES, BATCH = 256, 24, 4


class ScriptedExecutor(FakeExecutor):
    """After the last ``=`` of a prompt comes the script and then ``<end>``; else tokens are the fake's.

    Attributes:
        gate: a step waits until it is set.
        failures: raised by the next steps, one each; ``None``: that step does not fail.
    """

    def __init__(self, script: str) -> None:
        super().__init__(PAGES, byte_tokenizer.VOCAB)
        encode = byte_tokenizer.bytes_tokenizer().encode
        (self._begin,) = encode("=").ids
        self._script = [*encode(script).ids, byte_tokenizer.END]
        self.gate = threading.Event()
        self.gate.set()
        self.failures: list[Exception | None] = []

    def next_tokens(
        self, batch: StepBatch, sequences: list[Sequence], *, ahead: bool = False
    ) -> Callable[[], list[int]]:
        assert self.gate.wait(HANG_SECONDS)
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        return super().next_tokens(batch, sequences, ahead=ahead)

    def logits(self, history: tuple[int, ...]) -> NDArray[np.float32]:
        if self._begin not in history:
            return super().logits(history)
        scores = np.zeros(self.vocab_size, np.float32)
        scores[self._script[history[::-1].index(self._begin) % len(self._script)]] = 20.0
        return scores


def make_model(
    folder: Path,
    script: str = "hello",
    defaults: GenerationDefaults = DEFAULTS,
    *,
    encoder: bool = False,
    prefix_caching: bool = False,
) -> Model:
    """A model of the script, behind an encoder or not; its tokenizer is in ``folder``."""
    byte_tokenizer.save(folder / "tokenizer")
    record = fake_chain.record()
    if encoder:
        record = dataclasses.replace(record, encoder=record.steps[:1])
    record = dataclasses.replace(
        record, vocab_size=byte_tokenizer.VOCAB, generation=defaults, max_context=CONTEXT
    )
    limits = Limits(BATCH, 64, CONTEXT, PAGES, sources=encoder, prefix_caching=prefix_caching)
    engine = Engine(ScriptedExecutor(script), limits, Vocabulary(byte_tokenizer.VOCAB), Stats())
    return Model(folder, record, "cpu", MemoryPlan(0, 0, PAGES, 0, 0, 0, 0, 0), engine, None)


def executor_of(model: Model) -> ScriptedExecutor:
    """What runs its steps."""
    executor = model.engine._executor
    assert isinstance(executor, ScriptedExecutor)
    return executor


def clients_inside(server: Server) -> int:
    """How many have been let in and have not left."""
    return len(server._admission._tickets)


@contextmanager
def served(model: Model, template: str | None = TEMPLATE, **options: Any) -> Iterator[tuple[str, Server]]:
    """A server of ``model`` and its address; stopped in the end."""
    listener = bind("127.0.0.1", 0)
    tokenizer = Tokenizer(model.path / "tokenizer", template)
    chosen: dict[str, Any] = {"name": NAME, "grace_seconds": 0.0} | options
    server = Server(model, tokenizer, Options(**chosen), listener)
    port = listener.getsockname()[1]
    started = threading.Event()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            server.run(started.set)
        except Exception as error:  # noqa: BLE001 the test looks at it
            raised.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(HANG_SECONDS)
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.stop()
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()
        server.raised = raised  # type: ignore[attr-defined]
