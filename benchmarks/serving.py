"""What HTTP costs: streamed requests through `moec serve`, beside the same requests given to the engine by hand.

    python -m benchmarks.serving dsv2.moec --device cuda:0 --concurrency 1 --concurrency 8

So many requests are under way at once, each followed by the next; prompts are random token ids, all of one length, and
end tokens are ignored. The engine runs in this process, then the server in one of its own, which this one asks. Times
to the first token are from the sending of a request, its prompt included; those between tokens are of all others.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
import numpy as np

from benchmarks.support.common import print_rows, write_result
from moec import runtime
from moec.runtime import Request

if TYPE_CHECKING:
    from moec.runtime import Engine, Sequence

    Prompts = list[list[int]]

WARM_UP_REQUESTS = 2


@dataclass
class Times:
    """When the tokens of a request came."""

    sent: float
    tokens: list[float] = field(default_factory=list)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--device", default="cpu", show_default=True)
@click.option("--concurrency", "counts", type=int, multiple=True, default=(1, 8), show_default=True)
@click.option("--requests", default=32, show_default=True, help="For each concurrency.")
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
def main(
    bundle: Path, device: str, counts: tuple[int, ...], requests: int, prompt_tokens: int, new_tokens: int
) -> None:
    """Measure BUNDLE."""
    with runtime.load(bundle, device=device, max_batch=max(counts), verify="sizes") as model:
        random = np.random.default_rng(0)
        vocabulary = model.record.vocab_size
        prompts: Prompts = random.integers(3, vocabulary, (requests, prompt_tokens)).tolist()
        run_engine(model.engine, prompts[:WARM_UP_REQUESTS], max(counts), new_tokens)
        by_hand = [run_engine(model.engine, prompts, count, new_tokens) for count in counts]
    served = run_server(bundle, device, prompts, counts, new_tokens)
    rows: list[dict[str, Any]] = []
    for count, engine, http in zip(counts, by_hand, served, strict=True):
        for name, times in (("engine", engine), ("served", http)):
            rows.append({"concurrency": count, "run": name, **figures(times)})
        rows[-1]["ratio"] = rows[-1]["tokens/s"] / rows[-2]["tokens/s"]
    path = write_result(f"serving-{device.partition(':')[0]}-{bundle.stem}", rows)
    print_rows(rows)
    print(path)


def run_engine(engine: Engine, prompts: Prompts, count: int, new_tokens: int) -> list[Times]:
    """``count`` requests at once, by hand."""
    waiting, done = list(prompts), list[Times]()
    running: dict[Sequence, Times] = {}
    while waiting or running:
        while waiting and len(running) < count:
            request = Request(tuple(waiting.pop(0)), new_tokens)
            running[engine.add(request)] = Times(perf_counter())
        outputs = engine.step()
        now = perf_counter()
        for output in outputs:
            running[output.sequence].tokens.append(now)
            if output.sequence.finished:
                done.append(running.pop(output.sequence))
    return done


def run_server(
    bundle: Path, device: str, prompts: Prompts, counts: tuple[int, ...], new_tokens: int
) -> list[list[Times]]:
    """The same through HTTP."""
    command = [
        sys.executable,
        "-m",
        "moec",
        "serve",
        str(bundle),
        "--device",
        device,
        "--port",
        "0",
        "--json",
    ]
    command += ["--max-batch", str(max(counts))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = urlsplit(json.loads(server.stdout.readline())["url"])
            host, port = address.hostname or "", address.port or 0
            asyncio.run(run_clients(host, port, prompts[:WARM_UP_REQUESTS], max(counts), new_tokens))
            return [asyncio.run(run_clients(host, port, prompts, count, new_tokens)) for count in counts]
        finally:
            server.terminate()


async def run_clients(host: str, port: int, prompts: Prompts, count: int, new_tokens: int) -> list[Times]:
    """``count`` clients, which take the next prompt as soon as they have an answer."""
    waiting = iter(prompts)
    done: list[Times] = []

    async def client() -> None:
        for prompt in waiting:
            done.append(await ask(host, port, prompt, new_tokens))  # noqa: PERF401 - clients take turns

    await asyncio.gather(*(client() for _ in range(count)))
    return done


async def ask(host: str, port: int, prompt: list[int], new_tokens: int) -> Times:
    """One streamed request. A chunk without text, in the middle of a character, is not sent: such tokens come later."""
    body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    content = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    times = Times(perf_counter())
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(head.encode() + content)
    last = b""
    async for line in reader:
        if line.startswith(b'data: {"'):
            times.tokens.append(perf_counter())
            last = line
    writer.close()
    times.tokens.pop()
    usage = json.loads(last.removeprefix(b"data: "))["usage"]
    assert usage["completion_tokens"] == new_tokens, last
    return times


def figures(done: list[Times]) -> dict[str, float]:
    """Tokens a second of all together, and milliseconds that half and nine tenths of the times do not exceed."""
    first = [times.tokens[0] - times.sent for times in done]
    between = [later - earlier for times in done for earlier, later in pairwise(times.tokens)]
    seconds = max(times.tokens[-1] for times in done) - min(times.sent for times in done)
    return {
        "tokens/s": sum(len(times.tokens) for times in done) / seconds,
        **_parts("first", first),
        **_parts("between", between),
    }


def _parts(name: str, seconds: list[float]) -> dict[str, float]:
    tenths = quantiles(seconds, n=10, method="inclusive")
    return {f"{name} ms": tenths[4] * 1e3, f"{name} ms, 90 %": tenths[8] * 1e3}


if __name__ == "__main__":
    main()
