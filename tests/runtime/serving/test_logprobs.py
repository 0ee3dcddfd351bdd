"""Log probabilities of tokens, and of those of an echoed prompt."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from moec.errors import DeviceError
from tests.support.asking import SCRIPT, completion, connected, events, refusal, wait_until_idle
from tests.support.served import PAGES, executor_of, make_model, served

if TYPE_CHECKING:
    from pathlib import Path

    import httpx
    from numpy.typing import NDArray

    from moec.runtime.engine.batch import StepBatch


def test_logprobs_are_the_models_own(client: httpx.Client) -> None:
    answer = completion(client, max_tokens=2, logprobs=2)
    scored = answer["choices"][0]["logprobs"]
    assert scored["tokens"] == ["G", "r"]
    assert scored["text_offset"] == [0, 1]
    assert scored["token_logprobs"] == pytest.approx([0.0, 0.0], abs=1e-5)
    assert all(
        top[token] == value and len(top) == 2
        for top, token, value in zip(
            scored["top_logprobs"], scored["tokens"], scored["token_logprobs"], strict=True
        )
    )
    body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 1}
    content = client.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"] == "G"
    assert content[2]["bytes"] is None
    assert content[0]["top_logprobs"] == [{key: content[0][key] for key in ("token", "logprob", "bytes")}]
    assert len(content) == len(SCRIPT.encode())
    streamed = events(client, "/v1/chat/completions", body)
    assert [
        token
        for chunk in streamed
        for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ] == content


def test_an_echoed_prompt_is_scored_while_others_run(tmp_path: Path) -> None:
    model, twin = make_model(tmp_path, SCRIPT), make_model(tmp_path, SCRIPT)
    prompts = ["of the fake's own, which is longer than a step has rows " * 3, "another"]
    ids = [twin.encode(prompt) for prompt in prompts]
    with (
        served(model) as (url, _),
        connected(url) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        alone = completion(client, max_tokens=60, ignore_eos=True)["choices"][0]["text"]
        beside = pool.submit(completion, client, max_tokens=60, ignore_eos=True)
        body = {"prompt": ids, "max_tokens": 1, "logprobs": 2, "echo": True, "n": 2, "temperature": 0}
        answers = completion(client, **body)["choices"]
        (streamed,) = [
            chunk["choices"][0]["logprobs"]
            for chunk in events(client, "/v1/completions", {**body, "prompt": ids[1], "n": 1})
        ]
        assert beside.result()["choices"][0]["text"] == alone
        wait_until_idle(model)
    assert streamed == answers[2]["logprobs"]
    for number, answer in enumerate(answers):
        own = ids[number // 2]
        rows = twin.forward(own)[0].astype(np.float64)
        rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
        found = answer["logprobs"]
        new = int(rows[-1].argmax())
        assert answer["text"].startswith(prompts[number // 2])
        assert found["tokens"][:-1] == list(prompts[number // 2])
        assert found["text_offset"] == list(range(len(own) + 1))
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        expected = [rows[place, token] for place, token in enumerate([*own[1:], new])]
        assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)
        best = [max(row) for row in rows]
        assert [max(top.values()) for top in found["top_logprobs"][1:]] == pytest.approx(best, abs=1e-5)


def test_a_prompt_is_not_scored_where_others_hold_the_cache(tmp_path: Path) -> None:
    model = make_model(tmp_path, SCRIPT)
    with served(model) as (url, _), connected(url) as client:
        pages = model.engine.scheduler.pages.allocate(PAGES)
        assert pages is not None
        body = {"prompt": "x", "max_tokens": 1, "echo": True, "logprobs": 0}
        assert refusal(client, "/v1/completions", body, 429)["code"] == "rate_limit_exceeded"
        model.engine.scheduler.pages.release(pages)
        assert completion(client, **body)["choices"][0]["logprobs"]["top_logprobs"] == [None, {}]
        wait_until_idle(model)


@pytest.mark.parametrize("error", [ValueError("no"), DeviceError("The GPU is gone.")])
def test_a_model_that_fails_while_it_scores_is_an_error_in_a_stream_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    model = make_model(tmp_path, SCRIPT)

    def broken(batch: StepBatch) -> NDArray[np.float32]:
        raise error

    body = {"prompt": "x", "max_tokens": 1, "echo": True, "logprobs": 0}
    with served(model) as (url, _), connected(url) as client:
        monkeypatch.setattr(executor_of(model), "run", broken)
        whole = refusal(client, "/v1/completions", body, 500)
        (streamed,) = events(client, "/v1/completions", body)
        monkeypatch.undo()
        wait_until_idle(model)
    assert whole["code"] == "step_failed"
    assert streamed == {"error": whole}
    assert "was not scored" in caplog.text
