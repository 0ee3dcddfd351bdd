from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from moec.artifacts.model import GenerationDefaults
from moec.errors import DeviceError, NetworkError
from moec.runtime.serving.server import bind
from tests.support.byte_tokenizer import END, bytes_tokenizer
from tests.support.served import BATCH, CONTEXT, NAME, PAGES, executor_of, make_model, served

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from moec.runtime.model import Model

SCRIPT = "Grüße, 世界! 🙂 Stop here"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"), SCRIPT)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The same, not served: an engine has one driver."""
    return make_model(tmp_path_factory.mktemp("twin"), SCRIPT)


@pytest.fixture(scope="module")
def client(model: Model) -> Iterator[httpx.Client]:
    with served(model) as (url, _), httpx.Client(base_url=url, timeout=20) as client:
        yield client


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends as it should."""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def completion(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"prompt": "x=", "max_tokens": 99} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refusal(client: httpx.Client, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def wait_until_idle(model: Model) -> None:
    for _ in range(500):
        if not model.engine.busy:
            break
        time.sleep(0.01)
    assert not model.engine.busy
    assert model.engine.scheduler.pages.free == PAGES


def test_a_completion_is_whole_and_counted(client: httpx.Client) -> None:
    answer = completion(client)
    assert answer["object"] == "text_completion"
    assert answer["model"] == NAME
    assert answer["choices"] == [{"index": 0, "text": SCRIPT, "logprobs": None, "finish_reason": "stop"}]
    tokens = len(SCRIPT.encode()) + 1
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": tokens, "total_tokens": tokens + 2}


def test_a_stream_never_splits_a_character_and_sums_to_the_answer(client: httpx.Client) -> None:
    chunks = events(
        client,
        "/v1/completions",
        {"prompt": "x=", "max_tokens": 99, "stream_options": {"include_usage": True}},
    )
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    texts = [chunk["choices"][0]["text"] for chunk in chunks[:-1]]
    assert "".join(texts) == SCRIPT
    assert "\ufffd" not in "".join(texts)
    assert len(texts) >= len(SCRIPT)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * len(texts)
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(SCRIPT.encode()) + 1


def test_a_conversation_goes_through_the_template(client: httpx.Client) -> None:
    body = {
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        ],
        "chat_template_kwargs": {"mood": "Gr"},
    }
    prompt = "[system] be brief\n[user] hi\n[assistant]=Gr"
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": SCRIPT[2:], "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == len(prompt.encode())
    chunks = events(client, "/v1/chat/completions", body)
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == SCRIPT[2:]
    assert "usage" not in chunks[-1]
    tokens = client.post("/tokenize", json={"messages": body["messages"]}).json()
    assert tokens["count"] == len(prompt.encode()) - 2


@pytest.mark.parametrize("stop", ["Stop", ["never", " 🙂 St"], "界!"])
def test_stop_strings_end_the_text_before_them(client: httpx.Client, stop: str | list[str]) -> None:
    found = next(each for each in ([stop] if isinstance(stop, str) else stop) if each in SCRIPT)
    text = SCRIPT[: SCRIPT.index(found)]
    answer = completion(client, stop=stop)
    assert answer["choices"][0]["text"] == text
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len((text + found).encode())
    chunks = events(client, "/v1/completions", {"prompt": "x=", "max_tokens": 99, "stop": stop})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


def test_prompts_of_all_kinds_and_several_choices(client: httpx.Client) -> None:
    ids = bytes_tokenizer().encode("x=").ids
    for prompt in (ids, [ids, ids], ["x=", "longer x="]):
        answer = completion(client, prompt=prompt, n=2, max_tokens=3, echo=True)
        texts = ["x=", "longer x="] if prompt == ["x=", "longer x="] else ["x="] * (2 if prompt != ids else 1)
        expected = [text + SCRIPT[:2] for text in texts for _ in range(2)]
        # The third token is half of a character.
        assert [choice["text"] for choice in answer["choices"]] == [each + "\ufffd" for each in expected]
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
        assert answer["usage"]["prompt_tokens"] == sum(len(text) for text in texts)
        assert answer["usage"]["completion_tokens"] == 3 * len(expected)


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
        httpx.Client(base_url=url, timeout=20) as client,
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
    with served(model) as (url, _), httpx.Client(base_url=url, timeout=20) as client:
        pages = model.engine.scheduler.pages.allocate(PAGES)
        assert pages is not None
        body = {"prompt": "x", "max_tokens": 1, "echo": True, "logprobs": 0}
        assert refusal(client, "/v1/completions", body, 429)["code"] == "rate_limit_exceeded"
        model.engine.scheduler.pages.release(pages)
        assert completion(client, **body)["choices"][0]["logprobs"]["top_logprobs"] == [None, {}]
        wait_until_idle(model)


def test_eight_at_once_say_what_each_says_alone(client: httpx.Client, twin: Model) -> None:
    prompts = [f"prompt number {n}, of the fake's own words" for n in range(8)]

    def ask(prompt: str) -> Any:
        answer = completion(client, prompt=prompt, max_tokens=20, temperature=0, ignore_eos=True)
        return answer["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, prompts))
    for prompt, text in zip(prompts, together, strict=True):
        ids = twin.generate(twin.encode(prompt), max_new_tokens=20, do_sample=False, eos_token_id=[])
        assert text == twin.decode(ids[0][len(twin.encode(prompt)) :])


def test_options_of_sampling_reach_the_sampler(client: httpx.Client, twin: Model) -> None:
    prompt = "sampled"
    ids = twin.encode(prompt)
    options: dict[str, Any] = {
        "temperature": 1.5,
        "top_p": 0.9,
        "top_k": 40,
        "repetition_penalty": 1.2,
        "seed": 5,
    }
    answers = completion(client, prompt=prompt, n=2, max_tokens=12, ignore_eos=True, **options)["choices"]
    rows = twin.generate([ids, ids], max_new_tokens=12, eos_token_id=[], do_sample=True, **options)
    assert [answer["text"] for answer in answers] == [twin.decode(row[len(ids) :]) for row in rows]
    banned = completion(client, max_tokens=1, logit_bias={str(bytes_tokenizer().encode("G").ids[0]): -100})
    assert banned["choices"][0]["text"] != "G"
    assert completion(client, max_tokens=2, stop_token_ids=bytes_tokenizer().encode("r").ids)["choices"][
        0
    ] == {
        "index": 0,
        "text": "G",
        "logprobs": None,
        "finish_reason": "stop",
    }
    end = completion(client, min_tokens=40, max_tokens=40)
    assert end["usage"]["completion_tokens"] == 40


def test_defaults_are_the_checkpoints_and_zero_is_greedy(tmp_path: Path) -> None:
    hot = GenerationDefaults(None, (END,), None, True, 50.0, 0, 1.0, 1.0)
    model = make_model(tmp_path, SCRIPT, hot)
    with served(model) as (url, _), httpx.Client(base_url=url) as client:
        assert completion(client, temperature=0, max_tokens=1)["choices"][0]["text"] == "G"
        texts = {completion(client, max_tokens=4, seed=n)["choices"][0]["text"] for n in range(3)}
        assert len(texts) == 3


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"surprise": 1}, "surprise", "unknown_parameter"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"min_p": 0.1}, "min_p", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 99}, "n", None),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["x"] * 65}, "stop", "invalid_value"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"999": 1}}, None, None),
        ({"forced_bos_token_id": 1}, "forced_bos_token_id", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": 5}, "prompt", "invalid_value"),
        ({"prompt": [True]}, "prompt", "invalid_value"),
        ({"prompt": [999]}, None, None),
        ({"prompt": ""}, None, None),
        ({"prompt": "x" * (CONTEXT - 5), "max_tokens": 6}, None, "context_length_exceeded"),
    ],
)
def test_what_is_not_done_is_refused(
    client: httpx.Client, body: dict[str, Any], param: str | None, code: str | None
) -> None:
    error = refusal(client, "/v1/completions", {"prompt": "x="} | body)
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code), error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content"),
    ],
)
def test_what_chats_do_not_have_is_refused(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]} | body
    assert refusal(client, "/v1/chat/completions", body)["param"] == param


def test_fields_that_ask_for_nothing_are_taken(client: httpx.Client) -> None:
    body = {
        "messages": [
            {"role": "assistant", "content": "a", "tool_calls": None, "refusal": None, "annotations": []},
            {"role": "user", "content": "hi", "name": "me"},
        ],
        "model": NAME, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False,
        "user": "me", "n": None, "temperature": None, "stop": None, "parallel_tool_calls": True,
        "min_p": 0.0, "skip_special_tokens": True, "stream": True, "stream_options": {"include_obfuscation": False},
    }  # fmt: skip
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_names_paths_methods_and_broken_bodies(client: httpx.Client) -> None:
    assert (
        refusal(client, "/v1/completions", {"prompt": "x", "model": "gpt-5"}, 404)["code"]
        == "model_not_found"
    )
    assert client.get("/v1/models").json()["data"][0]["id"] == NAME
    assert client.get(f"/v1/models/{NAME}").json()["max_model_len"] == CONTEXT
    assert client.get("/v1/models/other").status_code == 404
    assert refusal(client, "/v1/nothing", {}, 404)["type"] == "not_found_error"
    assert client.get("/v1/completions").json()["error"]["message"] == "Method Not Allowed"
    assert client.post("/v1/completions", content='{"prompt": "x"}').status_code == 400
    assert refusal(client, "/v1/completions", {})["code"] == "missing_required_parameter"


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b"", None),
        (b"{", None),
        (b'{"prompt": "\xff"}', None),
        (b"[" * 100_000, None),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", None),
        (rb'{"prompt": "x\ud800"}', "prompt"),
        (rb'{"prompt": "x", "\ud800": 1}', None),
    ],
    ids=["empty", "cut", "no UTF-8", "deep", "a long number", "half a character", "half a name"],
)
def test_bodies_that_are_none(client: httpx.Client, content: bytes, param: str | None) -> None:
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_tokens_there_and_back(client: httpx.Client) -> None:
    tokens = client.post("/tokenize", json={"prompt": SCRIPT}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(SCRIPT.encode())
    assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": SCRIPT}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    refusal(client, "/detokenize", {"tokens": [1 << 40]})


def test_metrics_count(client: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))

    before = value("moec_generated_tokens_total"), value("moec_time_to_first_token_seconds_count")
    completion(client, max_tokens=5)
    assert value("moec_generated_tokens_total") == before[0] + 5
    assert value("moec_time_to_first_token_seconds_count") == before[1] + 1
    assert value("moec_sequences_running") == 0
    client.get("/v1/models/nobody")
    assert value('moec_http_requests_total{path="/v1/models/{name:path}",status="404"}') >= 1


def test_a_client_that_goes_away_frees_its_pages(client: httpx.Client, model: Model) -> None:
    gate = executor_of(model).gate
    for stream in (True, False):
        gate.clear()
        body = {"prompt": "x=", "max_tokens": 200, "stream": stream, "ignore_eos": True}
        with httpx.Client(base_url=client.base_url) as leaving:
            if stream:
                gate.set()
                with leaving.stream("POST", "/v1/completions", json=body) as response:
                    next(response.iter_lines())
                    gate.clear()
            else:
                with pytest.raises(httpx.ReadTimeout):
                    leaving.post("/v1/completions", json=body, timeout=0.3)
        time.sleep(0.1)
        generated = model.engine.stats.generated_tokens
        gate.set()
        wait_until_idle(model)
        assert model.engine.stats.generated_tokens < generated + 100


def test_who_comes_when_all_places_are_taken_is_told_to_try_again(tmp_path: Path) -> None:
    model = make_model(tmp_path, SCRIPT)
    with (
        served(model, max_waiting=1) as (url, _),
        httpx.Client(base_url=url, timeout=20) as client,
        ThreadPoolExecutor(BATCH + 1) as pool,
    ):
        executor_of(model).gate.clear()
        waiting = [pool.submit(completion, client, max_tokens=2) for _ in range(BATCH + 1)]
        for _ in range(200):
            response = client.post("/v1/completions", json={"prompt": "x=", "max_tokens": 1, "n": 2})
            if response.status_code == 429:
                break
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "rate_limit_error"
        executor_of(model).gate.set()
        assert [each.result()["choices"][0]["text"] for each in waiting] == ["Gr"] * (BATCH + 1)


def test_a_failed_step_is_an_error_and_the_server_goes_on(client: httpx.Client, model: Model) -> None:
    executor_of(model).failures = [ValueError("secret")]
    error = refusal(client, "/v1/completions", {"prompt": "x="}, 500)
    assert error["type"] == "server_error"
    assert error["code"] == "step_failed"
    assert "secret" not in error["message"]
    executor_of(model).failures = [ValueError("secret")]
    assert events(client, "/v1/completions", {"prompt": "x="})[-1]["error"]["code"] == "step_failed"
    assert completion(client)["choices"][0]["text"] == SCRIPT


def test_a_device_that_fails_ends_the_server(tmp_path: Path) -> None:
    model = make_model(tmp_path, SCRIPT)
    with served(model) as (url, server):
        executor_of(model).failures = [DeviceError("The GPU is gone.")]
        response = httpx.post(f"{url}/v1/completions", json={"prompt": "x="})
        assert response.status_code == 500
        assert "The GPU is gone." in response.json()["error"]["message"]
    assert [type(error) for error in server.raised] == [DeviceError]  # type: ignore[attr-defined]


def test_a_second_signal_ends_what_the_first_waits_for(tmp_path: Path) -> None:
    model = make_model(tmp_path, SCRIPT)
    gate = executor_of(model).gate
    with served(model, grace_seconds=20.0) as (url, server), ThreadPoolExecutor(1) as pool:
        gate.clear()
        running = pool.submit(httpx.post, f"{url}/v1/completions", json={"prompt": "x="}, timeout=20)
        while not model.engine.busy:
            time.sleep(0.01)
        server.stop()
        server.stop()
        assert running.result().status_code == 503
        gate.set()
    server.stop()


@pytest.mark.parametrize("grace", [0.0, 20.0])
def test_stopping_waits_for_what_runs_as_long_as_it_may(tmp_path: Path, grace: float) -> None:
    model = make_model(tmp_path, SCRIPT)
    gate = executor_of(model).gate
    with served(model, grace_seconds=grace) as (url, server), ThreadPoolExecutor(1) as pool:
        gate.clear()
        running = pool.submit(httpx.post, f"{url}/v1/completions", json={"prompt": "x="}, timeout=20)
        while not model.engine.busy:
            time.sleep(0.01)
        if grace:
            client = httpx.Client(base_url=url)
            assert client.get("/health").json() == {"status": "ok"}
            server.stop()
            while client.get("/health").status_code == 200:
                time.sleep(0.01)
            assert refusal(client, "/v1/completions", {"prompt": "x="}, 503)["code"] == "shutting_down"
            client.close()
            threading.Timer(0.05, gate.set).start()
            assert running.result().json()["choices"][0]["text"] == SCRIPT[:10]
        else:
            server.stop()
            assert running.result().status_code == 503
            gate.set()


def test_the_key_and_the_limit_on_bodies(tmp_path: Path) -> None:
    origin = "https://example.org"
    with (
        served(make_model(tmp_path), api_key="k", max_body_bytes=100, allow_origins=[origin]) as (url, _),
        httpx.Client(base_url=url) as client,
    ):
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "k"}):
            response = client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        client.headers["Authorization"] = "Bearer k"
        assert client.get("/v1/models").status_code == 200
        long = json.dumps({"prompt": "x" * 100}).encode()
        for content in (long, iter([long])):
            response = client.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        response = httpx.options(f"{url}/v1/completions", headers=preflight)
        assert response.headers["access-control-allow-origin"] == origin


def test_without_a_template_there_is_no_chat(tmp_path: Path) -> None:
    with served(make_model(tmp_path), template=None) as (url, _), httpx.Client(base_url=url) as client:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        assert "no chat template" in refusal(client, "/v1/chat/completions", body)["message"]


def test_behind_an_encoder_prompts_are_what_it_reads(tmp_path: Path) -> None:
    start, language = bytes_tokenizer().encode("^=").ids
    defaults = GenerationDefaults(None, (END,), None, False, 1.0, 0, 1.0, 1.0, decoder_start_token_id=start)
    model = make_model(tmp_path, "Bonjour", defaults, encoder=True)
    with served(model) as (url, _), httpx.Client(base_url=url, timeout=20) as client:
        answer = completion(client, prompt="hello, you", forced_bos_token_id=language)
        assert answer["choices"][0]["text"] == "=Bonjour"
        assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 9, "total_tokens": 19}
        texts = [choice["text"] for choice in completion(client, prompt=["one", "two"], n=2)["choices"]]
        own = make_model(tmp_path, "Bonjour", defaults, encoder=True)
        rows = own.generate([own.encode("one"), own.encode("two")], max_new_tokens=99)
        assert texts == [own.decode(row[1:][row[1:] != END]) for row in rows for _ in range(2)]
        long = {"prompt": "x" * (CONTEXT + 1)}
        assert refusal(client, "/v1/completions", long)["code"] == "context_length_exceeded"
        assert refusal(client, "/v1/completions", {"prompt": "x", "echo": True})["param"] == "echo"
        body = {"messages": [{"role": "user", "content": "hi"}]}
        assert "does not chat" in refusal(client, "/v1/chat/completions", body)["message"]


def test_an_address_that_is_taken_is_a_typed_error() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(NetworkError, match="Cannot listen"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(NetworkError, match="Cannot listen"):
        bind("no.such.host.invalid", 1)


def test_the_openai_client(client: httpx.Client) -> None:
    openai = pytest.importorskip("openai")
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0)
    assert [model.id for model in api.models.list()] == [NAME]
    messages = [{"role": "user", "content": "hi"}]
    answer = api.chat.completions.create(model=NAME, messages=messages, temperature=0, logprobs=True)
    assert answer.choices[0].message.content == SCRIPT
    assert answer.choices[0].logprobs.content[0].token == "G"
    assert answer.usage.completion_tokens == len(SCRIPT.encode()) + 1
    stream = api.chat.completions.create(
        model=NAME, messages=[*messages, answer.choices[0].message], stream=True,
        stream_options={"include_usage": True}, extra_body={"top_k": 1},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SCRIPT
    assert chunks[-1].usage.total_tokens > 0
    completed = api.completions.create(model=NAME, prompt="x=", max_tokens=3, stop="r")
    assert completed.choices[0].text == "G"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        api.chat.completions.create(
            model=NAME, messages=messages, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.NotFoundError):
        api.completions.create(model="other", prompt="x")
