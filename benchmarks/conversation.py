"""What the turns of a chat cost with prefix caching, beside the same prompts read whole: times to the first token.

    python -m benchmarks.conversation dsv2.moec --device cuda:0 --device-memory 8GiB

The engine by hand, one request at a time. Each turn's prompt is all that was asked and answered before, and a question
of random tokens. It runs twice: first behind the pages that the turn before has left, then whole, up to its first token
(which has the experts that the first run left resident). The first conversation warms up.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.support.common import print_rows, write_result
from moec import runtime
from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.runtime import Request

if TYPE_CHECKING:
    from moec.runtime import Engine, Sequence


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--device", default="cpu", show_default=True)
@click.option("--device-memory", metavar="SIZE")
@click.option("--turns", default=8, show_default=True)
@click.option("--question-tokens", default=64, show_default=True)
@click.option("--answer-tokens", default=64, show_default=True)
@click.option("--conversations", default=3, show_default=True, help="Of which the medians count.")
def main(
    bundle: Path,
    device: str,
    device_memory: str | None,
    turns: int,
    question_tokens: int,
    answer_tokens: int,
    conversations: int,
) -> None:
    """Measure BUNDLE."""
    rows: list[dict[str, Any]] = []
    times: list[list[tuple[float, float]]] = [[] for _ in range(turns)]
    longest = turns * (question_tokens + answer_tokens)
    with runtime.load(
        bundle,
        device=device,
        device_memory=device_memory,
        max_batch=1,
        cache_tokens=2 * (longest + PAGE_TOKENS),
        verify="sizes",
        prefix_caching=True,
    ) as model:
        random = np.random.default_rng(0)
        for number in range(conversations + 1):
            history: tuple[int, ...] = ()
            for turn in range(turns):
                question = random.integers(3, model.record.vocab_size, question_tokens)
                prompt = (*history, *question.tolist())
                behind, sequence = run(model.engine, Request(prompt, answer_tokens))
                whole, _ = run(model.engine, Request(prompt, 1, whole_prompt=True))
                history = tuple(sequence.tokens)
                if number:
                    times[turn].append((behind, whole))
                if number == conversations:
                    rows.append({"turn": turn + 1, "prompt tokens": len(prompt), "reused": sequence.reused})
    for row, pairs in zip(rows, times, strict=True):
        row["first ms"], row["whole ms"] = (median(each) * 1e3 for each in zip(*pairs, strict=True))
        row["ratio"] = median(behind / whole for behind, whole in pairs)
    path = write_result(f"conversation-{device.partition(':')[0]}-{bundle.stem}", rows)
    print_rows(rows)
    print(path)


def run(engine: Engine, request: Request) -> tuple[float, Sequence]:
    """Seconds to the first token of a request, which is run to its end."""
    began = perf_counter()
    sequence = engine.add(request)
    while not sequence.new_tokens:
        engine.step()
    first = perf_counter() - began
    while engine.busy:
        engine.step()
    return first, sequence


if __name__ == "__main__":
    main()
