"""The server as a process of its own, over the shipped example; what docs/serving.md shows is run as it stands."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from moec import runtime
from moec.__main__ import run
from moec.artifacts.files.traces import load_traces
from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.errors import MissingDependencyError, NetworkError
from moec.runtime.serving.server import bind

ROOT = Path(__file__).parents[2]
NAME = "tiny-deepseek-v2.moec"
DOCS = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
PROMPTS = [
    "In the beginning God",
    "And it came to pass",
    "Blessed are",
    "The LORD is",
    "Thou shalt",
    "Lo",
    "And",
    "I",
]


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server's address and its process, which is killed where it has not ended."""
    command = [sys.executable, "-m", "moec", "serve", str(bundle), "--port", "0", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        # Whoever waits for what it says does not do so for ever.
        timer = threading.Timer(300, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.stderr and process.stderr.read()
            yield json.loads(line)["url"], process
        finally:
            timer.cancel()
            process.kill()


def test_a_server_from_its_start_to_its_end(example_bundle: Path, tmp_path: Path) -> None:
    traces = tmp_path / "traces.npz"
    with serving(
        example_bundle, "--served-model-name", NAME, "--log-requests", "--trace-path", str(traces)
    ) as (url, process):
        client = httpx.Client(base_url=url, timeout=240)

        def ask(prompt: str) -> str:
            body = {"model": NAME, "prompt": prompt, "max_tokens": 24, "temperature": 0}
            text: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            return text

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(ask, PROMPTS))
        asked = {"prompt": 3 * ". ".join(PROMPTS), "max_tokens": 1}
        used = [client.post("/v1/completions", json=asked).json()["usage"] for _ in range(2)]
        assert used[0]["prompt_tokens_details"] == {"cached_tokens": 0}
        pages = (used[1]["prompt_tokens"] - 1) // PAGE_TOKENS
        assert used[1]["prompt_tokens_details"] == {"cached_tokens": pages * PAGE_TOKENS}
        assert pages > 0
        scored = {"prompt": PROMPTS[0], "max_tokens": 1, "echo": True, "logprobs": 0}
        logprobs = client.post("/v1/completions", json=scored).json()["choices"][0]["logprobs"]
        endless = {"prompt": PROMPTS[0], "max_tokens": 1000, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=endless) as response:
            next(response.iter_lines())
        shown = [block for block in DOCS.split("```")[1::2] if block.startswith(("sh\n", "python\n"))]
        curls, python = (block.partition("\n")[2].replace("localhost:8000", url[7:]) for block in shown[:2])
        exec(compile(python, "docs/serving.md", "exec"), {})
        if shutil.which("curl"):
            for command in curls.replace("\\\n", "").strip().split("\n\n"):
                done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True)
                assert '"finish_reason"' in done.stdout.replace(" ", ""), done.stdout
        metrics = client.get("/metrics").text
        assert "moec_sequences_running 0.0" in metrics
        client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        assert process.stderr is not None
        assert process.stderr.read().count('"POST /v1/completions HTTP/1.1" 200') >= len(PROMPTS) + 2
    assert load_traces(traces).tokens > 0
    with runtime.load(example_bundle, verify="sizes") as model:
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            ids = model.encode(prompt)
            expected = model.generate(ids, max_new_tokens=24, do_sample=False)[0][len(ids) :]
            assert answer == model.decode(expected)
        ids = model.encode(PROMPTS[0])
        logits = model.forward(ids)[0].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [logits[place, token] for place, token in enumerate(ids[1:])]
        assert logprobs["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-3)


def test_an_address_that_is_taken_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert run(["serve", str(tmp_path / "none.moec"), "--port", port]) == NetworkError.exit_code


def test_without_its_packages_it_says_which_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "moec.runtime.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(["serve", str(tmp_path / "none.moec")]) == MissingDependencyError.exit_code
    assert "pip install 'moec[serve]'" in capsys.readouterr().err
