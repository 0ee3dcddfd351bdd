"""Run a bundle end to end in this process and print what it took as JSON; the benchmarks start it as a child."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from benchmarks.support.budgets import limit_of_share
from benchmarks.support.work import Work, WorkType, run_work
from moec import runtime
from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.cli.bench import run_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.runtime import Model

WARM_UP_TOKENS = 4


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--work", "works", type=WorkType(), multiple=True, required=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--device-memory")
@click.option(
    "--share", type=float, help="Instead of --device-memory: as much as holds this share of the experts."
)
@click.option("--cpu-threads", type=click.IntRange(min=0), help="[default: the runtime's]")
@click.option("--step-tokens", type=click.IntRange(min=2), help="[default: the runtime's]")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--thread-clock",
    is_flag=True,
    help="Of a CPU with one thread: times that stand still while others have it.",
)
@click.option("--verify", type=click.Choice(["full", "once", "sizes"]), default="sizes", show_default=True)
def main(
    bundle: Path,
    works: tuple[Work, ...],
    device: str,
    device_memory: str | None,
    share: float | None,
    cpu_threads: int | None,
    step_tokens: int | None,
    repeats: int,
    thread_clock: bool,
    verify: Any,
) -> None:
    """Load BUNDLE once, and do each work."""
    batch, cache_tokens = max(work.batch for work in works), max(map(_cache_tokens, works))
    step_tokens = step_tokens and max(step_tokens, batch + 1)
    limit: str | int | None = device_memory
    if share is not None:
        if step_tokens is None:
            raise click.UsageError("--share needs --step-tokens.")
        sizes = {"max_batch": batch, "step_tokens": step_tokens, "cache_tokens": cache_tokens}
        limit = limit_of_share(bundle, share, 1 if cpu_threads is None else cpu_threads, **sizes)
    clock = time.thread_time if thread_clock else time.perf_counter
    start = time.perf_counter()
    with runtime.load(
        bundle,
        device=device,
        device_memory=limit,
        cpu_threads=cpu_threads,
        max_batch=batch,
        max_step_tokens=step_tokens,
        cache_tokens=cache_tokens,
        verify=verify,
    ) as model:
        loaded = time.perf_counter() - start
        first, _ = run_batch(model, 8, 2, 1)
        facts = {
            "target": model.target,
            "cpu_threads": model.cpu_threads,
            "gpu_bytes": model.memory.total_bytes if device.startswith("cuda") else 0,
            "load_seconds": loaded,
            "load_to_first_token_seconds": loaded + first,
            "runs": [measure(model, work, repeats, clock) for work in works],
        }
    print(json.dumps(facts))


def measure(
    model: Model, work: Work, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Medians over the repeats, after a short run of the same shapes."""
    run_batch(model, work.prompt_tokens, min(WARM_UP_TOKENS, work.new_tokens), work.batch)
    model.stats.reset()
    prefills, steps = [], []
    for _ in range(repeats):
        prefill, own = run_work(model, work, clock)
        prefills.append(prefill)
        steps += own
    return {
        "work": str(work),
        "prefill_seconds": median(prefills),
        "step_seconds": median(steps),
        "slowest_step_seconds": max(steps),
        "stats": model.stats.to_dict(),
    }


def _cache_tokens(work: Work) -> int:
    """Whole pages for each sequence."""
    return work.batch * (work.prompt_tokens + work.new_tokens + PAGE_TOKENS)


if __name__ == "__main__":
    main()
