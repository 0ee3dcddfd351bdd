"""Ask a server of `tests.support.served`, and check the form of what it says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx

from tests.support.served import PAGES
from tests.support.waiting import HANG_SECONDS, wait_until

if TYPE_CHECKING:
    from moec.runtime.model import Model

SCRIPT = "Grüße, 世界! 🙂 Stop here"
"""What models say."""


def connected(url: str) -> httpx.Client:
    """A client of the server at an address."""
    return httpx.Client(base_url=url, timeout=HANG_SECONDS)


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


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """What an answer with so many tokens says it took."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def wait_until_idle(model: Model) -> None:
    wait_until(lambda: not model.engine.busy and model.engine.scheduler.pages.free == PAGES)
