"""``/v1/chat/completions``: conversations, and what they do not have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.asking import SCRIPT, connected, events, refusal
from tests.support.served import NAME, make_model, served

if TYPE_CHECKING:
    from pathlib import Path

    import httpx


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


def test_without_a_template_there_is_no_chat(tmp_path: Path) -> None:
    with served(make_model(tmp_path), template=None) as (url, _), connected(url) as client:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        assert "no chat template" in refusal(client, "/v1/chat/completions", body)["message"]
