"""What the GPU does in one step, kernel by kernel: when each starts and ends, and what it adds to the step.

    python -m benchmarks.timeline dsv2.moec --work 1x512+16 --work 8x512+16 --work 1x2048+2
    python -m benchmarks.timeline dsv2.moec --work 1x512+16 --device-memory 8GiB

Kernels overlap where one is launched before the one in front of it has ended. *Adds* is from the end of all before it
to its own end: over a step these add up to the step. Needs torch on the same machine (its profiler).
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from benchmarks.support.common import print_rows, write_result
from benchmarks.support.profiled import gpu_events, kernels, run_and_leave
from benchmarks.support.work import Work, WorkType, run_work
from moec import runtime
from moec.artifacts.layout.cache import PAGE_TOKENS

if TYPE_CHECKING:
    from benchmarks.support.profiled import Event
    from moec.runtime import Model


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--work", "works", type=WorkType(), multiple=True, required=True)
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--step-tokens", default=512, show_default=True)
@click.option("--device-memory")
@click.option("--cpu-threads", type=click.IntRange(min=0), help="[default: the runtime's]")
def main(
    bundle: Path,
    works: tuple[Work, ...],
    device: str,
    step_tokens: int,
    device_memory: str | None,
    cpu_threads: int | None,
) -> None:
    """Profile the last decoding step of each work, or the prefill where it makes at most two tokens."""
    with runtime.load(
        bundle,
        device=device,
        device_memory=device_memory,
        cpu_threads=cpu_threads,
        max_batch=max(work.batch for work in works),
        max_step_tokens=max(step_tokens, *(work.batch * work.prompt_tokens for work in works)),
        cache_tokens=max(work.batch * (work.prompt_tokens + work.new_tokens + PAGE_TOKENS) for work in works),
        verify="sizes",
    ) as model:
        for work in works:
            run_work(model, work)
            found = profile(model, work)
            rows = by_kernel(found)
            total = sum(row["adds us"] for row in rows)
            print(f"{work}: {len(found)} kernels, {total:.0f} us")
            print_rows(rows)
            beside = f"-{device_memory}" if device_memory else ""
            write_result(f"timeline-{bundle.stem}-{work}{beside}", rows, step_us=total, order=order(found))


def profile(model: Model, work: Work) -> list[dict[str, Any]]:
    """The kernels of one step, by start: microseconds from the first one's start."""
    steps = _steps(kernels(gpu_events(partial(run_work, model, work))))
    chosen = steps[0] if work.new_tokens <= 2 else steps[-2]
    begin = chosen[0].start
    return [
        {"kernel": event.name, "start": event.start - begin, "end": event.end - begin} for event in chosen
    ]


def _steps(events: list[Event]) -> list[list[Event]]:
    """Cut after each sampling of tokens."""
    steps: list[list[Event]] = [[]]
    for event in events:
        steps[-1].append(event)
        if "sample" in event.name and _last_of_sampling(event, events):
            steps.append([])
    return [step for step in steps if step]


def _last_of_sampling(event: Event, events: list[Event]) -> bool:
    following = events.index(event) + 1
    return following == len(events) or "sample" not in events[following].name


def by_kernel(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a kernel, the costliest first."""
    groups: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    latest = 0.0
    for kernel in found:
        adds = max(0.0, kernel["end"] - latest)
        early = max(0.0, latest - kernel["start"])
        groups[kernel["kernel"]].append((adds, kernel["end"] - kernel["start"], early))
        latest = max(latest, kernel["end"])
    rows = [
        {
            "kernel": name,
            "calls": len(items),
            "adds us": sum(adds for adds, _, _ in items),
            "adds us a call": median(adds for adds, _, _ in items),
            "runs us": median(runs for _, runs, _ in items),
            "begins early us": median(early for _, _, early in items),
        }
        for name, items in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["adds us"])


def order(found: list[dict[str, Any]]) -> list[str]:
    """The step's kernels in order, with when they start and end."""
    return [f"{kernel['start']:.1f} {kernel['end']:.1f} {kernel['kernel']}" for kernel in found]


if __name__ == "__main__":
    run_and_leave(main)
