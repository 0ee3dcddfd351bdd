"""Clients that go, places that are taken, failures, and the end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest

from moec.errors import DeviceError, NetworkError
from moec.runtime.serving.server import bind
from tests.support.asking import SCRIPT, completion, events, refusal, wait_until_idle
from tests.support.served import BATCH, executor_of, make_model, served

if TYPE_CHECKING:
    from pathlib import Path

    from moec.runtime.model import Model


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


def test_an_address_that_is_taken_is_a_typed_error() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(NetworkError, match="Cannot listen"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(NetworkError, match="Cannot listen"):
        bind("no.such.host.invalid", 1)
