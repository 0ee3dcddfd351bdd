"""Requests that are wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.asking import refusal
from tests.support.served import CONTEXT

if TYPE_CHECKING:
    import httpx


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
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "invalid_value"),
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
