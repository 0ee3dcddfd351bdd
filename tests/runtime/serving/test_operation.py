"""Clients that go, places that are taken, failures, and the end."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest

from moec.errors import DeviceError, NetworkError
from moec.runtime.serving.server import bind
from tests.support.asking import SCRIPT, completion, connected, events, refusal, wait_until_idle
from tests.support.served import BATCH, clients_inside, executor_of, make_model, served
from tests.support.waiting import HANG_SECONDS, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from moec.runtime.model import Model
    from moec.runtime.serving.server import Server


def post(url: str) -> httpx.Response:
    """A small request."""
    return httpx.post(f"{url}/v1/completions", json={"prompt": "x="}, timeout=HANG_SECONDS)


def test_a_client_that_goes_away_frees_its_pages(server: tuple[str, Server], model: Model) -> None:
    (url, inside), gate = server, executor_of(model).gate
    wait_until(lambda: clients_inside(inside) == 0)
    for stream in (True, False):
        gate.clear()
        wanted = {"prompt": "x=", "max_tokens": 200, "stream": stream, "ignore_eos": True}
        body = json.dumps(wanted).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: moec\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as leaving:
            leaving.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            wait_until(lambda: clients_inside(inside) == 1)
            if stream:
                gate.set()
                assert leaving.recv(100).startswith(b"HTTP/1.1 200")
                gate.clear()
        wait_until(lambda: clients_inside(inside) == 0)
        generated = model.engine.stats.generated_tokens
        gate.set()
        wait_until_idle(model)
        assert model.engine.stats.generated_tokens < generated + 100


def test_who_comes_when_all_places_are_taken_is_told_to_try_again(tmp_path: Path) -> None:
    model = make_model(tmp_path, SCRIPT)
    with (
        served(model, max_waiting=1) as (url, server),
        connected(url) as client,
        ThreadPoolExecutor(BATCH + 1) as pool,
    ):
        executor_of(model).gate.clear()
        waiting = [pool.submit(completion, client, max_tokens=2) for _ in range(BATCH + 1)]
        wait_until(lambda: clients_inside(server) == BATCH + 1)
        response = client.post("/v1/completions", json={"prompt": "x=", "max_tokens": 1})
        assert response.status_code == 429
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
        response = post(url)
        assert response.status_code == 500
        assert "The GPU is gone." in response.json()["error"]["message"]
    assert [type(error) for error in server.raised] == [DeviceError]  # type: ignore[attr-defined]


def test_a_second_signal_ends_what_the_first_waits_for(tmp_path: Path) -> None:
    model = make_model(tmp_path, SCRIPT)
    gate = executor_of(model).gate
    with served(model, grace_seconds=2 * HANG_SECONDS) as (url, server), ThreadPoolExecutor(1) as pool:
        gate.clear()
        running = pool.submit(post, url)
        wait_until(lambda: model.engine.busy)
        server.stop()
        server.stop()
        assert running.result().status_code == 503
        gate.set()
    server.stop()


@pytest.mark.parametrize("grace", [0.0, 2 * HANG_SECONDS])
def test_stopping_waits_for_what_runs_as_long_as_it_may(tmp_path: Path, grace: float) -> None:
    model = make_model(tmp_path, SCRIPT)
    gate = executor_of(model).gate
    with served(model, grace_seconds=grace) as (url, server), ThreadPoolExecutor(1) as pool:
        gate.clear()
        running = pool.submit(post, url)
        wait_until(lambda: model.engine.busy)
        if grace:
            client = connected(url)
            assert client.get("/health").json() == {"status": "ok"}
            server.stop()
            wait_until(lambda: client.get("/health").status_code != 200)
            assert refusal(client, "/v1/completions", {"prompt": "x="}, 503)["code"] == "shutting_down"
            client.close()
            gate.set()
            assert running.result().json()["choices"][0]["text"] == SCRIPT[:10]
        else:
            server.stop()
            assert running.result().status_code == 503
            gate.set()


def test_an_address_that_is_taken_is_a_typed_error() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(NetworkError, match="Cannot listen"):
            bind("127.0.0.1", taken.getsockname()[1])
    for host in ("no.such.host.invalid", "no..host"):
        with pytest.raises(NetworkError, match="Cannot listen"):
            bind(host, 1)
