"""What clients and Prometheus are told of prompts that were in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

from moec.artifacts.layout.cache import PAGE_TOKENS
from tests.support.asking import SCRIPT, completion, connected, events, usage, wait_until_idle
from tests.support.served import PAGES, make_model, served

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from moec.runtime.model import Model

TEXT = "Tell me of the world, and of all that is in it, my friend: x="
NEW = len(SCRIPT.encode()) + 1


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return make_model(tmp_path, SCRIPT, prefix_caching=True)


@pytest.fixture
def client(model: Model) -> Iterator[httpx.Client]:
    with served(model) as (url, _), connected(url) as client:
        yield client


def chat(client: httpx.Client, *texts: str, **body: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
    response = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 99} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_conversation_says_what_it_did_not_read_again(client: httpx.Client, model: Model) -> None:
    first = chat(client, TEXT)
    said = first["choices"][0]["message"]["content"]
    assert said == SCRIPT
    second = chat(client, TEXT, said, "Go on: =")
    assert second["choices"][0]["message"]["content"] == SCRIPT
    prompts = [answer["usage"]["prompt_tokens"] for answer in (first, second)]
    # The template begins an answer that is to come in another way than one that was given.
    common = len(f"[user] {TEXT}\n[assistant]")
    assert common == prompts[0] - 1
    cached = common // PAGE_TOKENS * PAGE_TOKENS
    assert first["usage"] == usage(prompts[0], NEW)
    assert second["usage"] == usage(prompts[1], NEW, cached)
    wait_until_idle(model)
    lines = client.get("/metrics").text.splitlines()
    assert f"moec_reused_tokens_total {float(cached)}" in lines
    assert "moec_prefix_hits_total 1.0" in lines
    assert f"moec_prompt_tokens_total {float(sum(prompts) - cached)}" in lines
    assert f"moec_cache_pages_free {float(PAGES)}" in lines
    kept = model.engine.scheduler.pages.kept
    assert kept > 2
    assert f"moec_cache_pages_kept {float(kept)}" in lines


def test_a_prompt_counts_once_for_all_its_choices(client: httpx.Client) -> None:
    prompt = len(TEXT)
    found = completion(client, prompt=TEXT, n=3, max_tokens=4)["usage"]
    assert found == usage(prompt, 12)
    found = completion(client, prompt=TEXT, n=2, max_tokens=4)["usage"]
    assert found == usage(prompt, 8, 32)
    found = completion(client, prompt=[TEXT, "x="], max_tokens=4)["usage"]
    assert found == usage(prompt + 2, 8, 32)


def test_streams_say_it_with_their_usage(client: httpx.Client) -> None:
    body = {"prompt": TEXT, "max_tokens": 5, "stream_options": {"include_usage": True}}
    for cached in (0, 32):
        assert events(client, "/v1/completions", body)[-1]["usage"] == usage(len(TEXT), 5, cached)


def test_echoed_prompts_have_the_logprobs_of_all_their_tokens(client: httpx.Client) -> None:
    asked = {"prompt": TEXT, "max_tokens": 3, "echo": True, "logprobs": 2}
    first, second = (completion(client, **asked) for _ in range(2))
    assert first["choices"] == second["choices"]
    assert len(second["choices"][0]["logprobs"]["token_logprobs"]) == len(TEXT) + 3
    assert second["usage"] == usage(len(TEXT), 3, 32)
