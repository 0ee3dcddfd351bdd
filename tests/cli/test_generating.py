"""What ``moec generate`` and ``moec chat`` ask a model for."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from moec.__main__ import run
from moec.errors import RequestError
from moec.runtime.engine import Engine, Limits
from moec.runtime.memory.budget import MemoryPlan
from moec.runtime.model import Model
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.stats import Stats
from tests.support import fake_chain
from tests.support.fake_executor import FakeExecutor
from tests.support.served import make_model

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTEXT, VOCAB = 64, 31


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both commands get a model of 31 tokens, whose texts are token ids."""

    def load_model(*_: object, **__: object) -> Model:
        record = dataclasses.replace(fake_chain.record(), vocab_size=VOCAB)
        engine = Engine(FakeExecutor(32, VOCAB), Limits(3, 64, CONTEXT, 32), Vocabulary(VOCAB), Stats())
        model = Model(Path("nowhere"), record, "cpu", MemoryPlan(0, 0, 32, 0, 0, 0, 0, 0), engine, None)
        model.__dict__["tokenizer"] = SimpleNamespace(encode=_encode, decode=_decode, has_chat_template=False)
        return model

    for command in ("generate", "chat"):
        monkeypatch.setattr(f"moec.cli.{command}.load_model", load_model)


def _encode(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def _decode(ids: Sequence[int], *_: Any) -> str:
    return " ".join(map(str, ids))


def new_tokens(capsys: pytest.CaptureFixture[str]) -> list[int]:
    return [int(part) for part in capsys.readouterr().out.split(",")]


def test_without_a_number_the_context_is_filled(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ",".join(["7"] * (CONTEXT - 5))
    assert run(["generate", "x", "--greedy", "--token-ids", prompt]) == 0
    assert len(new_tokens(capsys)) == 5
    assert run(["generate", "x", "--greedy", "--token-ids", prompt, "--max-new-tokens", "3"]) == 0
    assert len(new_tokens(capsys)) == 3
    assert run(["generate", "x", "--token-ids", prompt, "--max-new-tokens", "6"]) == RequestError.exit_code
    assert f"context of {CONTEXT}" in capsys.readouterr().err


def test_a_decoder_has_no_use_for_a_language(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "x", "--token-ids", "1", "--forced-bos-token-id", "3"]) == RequestError.exit_code
    assert "no encoder" in capsys.readouterr().err


def test_a_conversation_goes_on_as_long_as_the_context_holds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("1 2 3\n" * 9))
    code = run(["chat", "x", "--greedy", "--max-new-tokens", "20", "--json"])
    said = capsys.readouterr()
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert [len(answer["token_ids"]) for answer in answers] == [20, 20, 15]
    assert code == RequestError.exit_code
    assert f"context of {CONTEXT}" in said.err


def test_text_ends_before_a_stop_string(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("generate", "chat"):
        monkeypatch.setattr(
            f"moec.cli.{command}.load_model", lambda *_, **__: make_model(tmp_path, "hello world")
        )
    options = ["--greedy", "--stop", "never", "--stop", " wor"]
    assert run(["generate", "x", "say=", *options]) == 0
    assert capsys.readouterr().out == "hello\n"
    assert run(["generate", "x", "say=", *options, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], len(answer["token_ids"])) == ("hello", len("hello wor"))
    monkeypatch.setattr("sys.stdin", io.StringIO("say=\n"))
    assert run(["chat", "x", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["content"] == "hello"


@pytest.mark.parametrize("command", ["chat", "serve"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [([], None), (["--prefix-caching"], True), (["--no-prefix-caching"], False)],
)
def test_whoever_talks_again_may_begin_with_what_is_cached(
    command: str, options: list[str], expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def load_model(*_: object, prefix_caching: object = "left out", **__: object) -> Model:
        asked.append(prefix_caching)
        raise RequestError("Enough.", "It was asked.", "Stop.")

    monkeypatch.setattr(f"moec.cli.{command}.load_model", load_model)
    port = ["--port", "0"] if command == "serve" else []
    assert run([command, "x", *port, *options]) == RequestError.exit_code
    assert asked == [expected]
