"""What choosing a token costs on a GPU: decoding steps by sampling options, beside steps that take the likeliest.

    python -m benchmarks.sampling dsv2.moec --device cuda:0

Options take turns with one model, so that clocks and heat are the same for all; medians. Sequences of a batch have
prompts of their own, so that they choose experts of their own also where all take the likeliest token.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.support.common import print_rows, write_result
from moec import runtime
from moec.runtime import Request, Sampling

if TYPE_CHECKING:
    from moec.runtime import Engine

VOCABULARY = 1000
PROMPT_TOKENS = 16
ROUNDS = 5
OPTIONS = {
    "likeliest": Sampling(),
    "temperature": Sampling(do_sample=True, temperature=0.8),
    "top-k 50": Sampling(do_sample=True, top_k=50),
    "top-p 0.9": Sampling(do_sample=True, top_p=0.9),
    "top-k 50, top-p 0.9": Sampling(do_sample=True, top_k=50, top_p=0.9),
    "penalty 1.1": Sampling(repetition_penalty=1.1),
    "all of these": Sampling(do_sample=True, temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.1),
}


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8), show_default=True)
@click.option("--step-tokens", default=512, show_default=True, help="Of the largest step.")
@click.option("--steps", default=24, show_default=True, help="Of each option in each of the rounds.")
def main(bundle: Path, device: str, batches: tuple[int, ...], step_tokens: int, steps: int) -> None:
    """Measure BUNDLE with all its experts resident."""
    rows: list[dict[str, Any]] = []
    with runtime.load(
        bundle,
        device=device,
        max_batch=max(batches),
        max_step_tokens=step_tokens,
        cache_tokens=4096,
        verify="sizes",
    ) as model:
        for batch in batches:
            times: dict[str, list[float]] = {name: [] for name in OPTIONS}
            for _ in range(ROUNDS):
                for name, sampling in OPTIONS.items():
                    times[name].append(step_seconds(model.engine, sampling, batch, steps))
            plain = median(times["likeliest"])
            for name, seconds in times.items():
                own = median(seconds)
                rows.append(
                    {"batch": batch, "options": name, "ms/step": own * 1e3, "beside us": (own - plain) * 1e6}
                )
    path = write_result(f"sampling-{device.partition(':')[0]}-{bundle.stem}", rows)
    print_rows(rows)
    print(path)


def step_seconds(engine: Engine, sampling: Sampling, batch: int, steps: int) -> float:
    """Seconds of a decoding step, the first few left out."""
    requests = []
    for seed in range(batch):
        prompt = np.random.default_rng(seed).integers(2, VOCABULARY, PROMPT_TOKENS).tolist()
        requests.append(Request(tuple(prompt), steps + 8, steps + 8, frozenset(), sampling, seed))
    sequences = [engine.add(request) for request in requests]
    while any(len(sequence.new_tokens) < 4 for sequence in sequences):
        engine.step()
    start, before = time.perf_counter(), len(sequences[0].new_tokens)
    for _ in range(steps):
        engine.step()
    seconds = (time.perf_counter() - start) / (len(sequences[0].new_tokens) - before)
    for sequence in sequences:
        engine.cancel(sequence)
    return seconds


if __name__ == "__main__":
    main()
