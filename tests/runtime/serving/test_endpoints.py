"""Names, tokens, metrics, the key, and OpenAI's own client."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.support.asking import SCRIPT, completion, connected, refusal
from tests.support.served import CONTEXT, NAME, make_model, served

if TYPE_CHECKING:
    from pathlib import Path

    import httpx


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


def test_the_key_and_the_limit_on_bodies(tmp_path: Path) -> None:
    origin, key = "https://example.org", "k\u00fc"
    with (
        served(make_model(tmp_path), api_key=key, max_body_bytes=100, allow_origins=[origin]) as (url, _),
        connected(url) as client,
    ):
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "k"}):
            response = client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        client.headers = {b"Authorization": f"Bearer {key}".encode()}
        assert client.get("/v1/models").status_code == 200
        long = json.dumps({"prompt": "x" * 100}).encode()
        for content in (long, iter([long])):
            response = client.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        response = client.options("/v1/completions", headers=preflight)
        assert response.headers["access-control-allow-origin"] == origin


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
