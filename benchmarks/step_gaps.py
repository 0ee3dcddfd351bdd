"""Decoding by the clock beside what the GPU works: how much it idles between two steps, ahead and one by one.

    python -m benchmarks.step_gaps dsv2.moec --work 1x512+64 --work 8x512+64

*Busy* is from the start of a step's first kernel to the end of its last, *idle* the time from there to the next one's
start; both are taken from torch's profiler, which slows things down a little. The wall time is measured without it.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import click

from benchmarks.support.common import print_rows, write_result
from benchmarks.support.profiled import gpu_events, kernels, run_and_leave
from benchmarks.support.work import Work, WorkType, run_work
from moec import runtime
from moec.runtime.chain.executor import ChainExecutor

if TYPE_CHECKING:
    from benchmarks.support.profiled import Event

LAST_KERNEL = "sample"
"""In the name of the last kernels of a step."""


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--work", "works", type=WorkType(), multiple=True, required=True)
@click.option("--device", default="cuda:0", show_default=True)
def main(bundle: Path, works: tuple[Work, ...], device: str) -> None:
    """Measure each work twice: steps begun ahead, and each begun when the tokens of the last one are known."""
    modes = {"ahead": ChainExecutor.can_run_ahead, "one by one": lambda *_: False}
    rows: list[dict[str, Any]] = []
    with runtime.load(
        bundle, device=device, max_batch=max(work.batch for work in works), verify="sizes"
    ) as model:
        for work, (name, mode) in product(works, modes.items()):
            with patch.object(ChainExecutor, "can_run_ahead", mode):
                run_work(model, work)
                _, steps = run_work(model, work)
                rows.append({"work": str(work), "steps": name, "wall ms": median(steps) * 1e3})
        # Afterwards, because a process that was profiled once launches more slowly.
        for row, (work, mode) in zip(rows, product(works, modes.values()), strict=True):
            with patch.object(ChainExecutor, "can_run_ahead", mode):
                busy, idle = busy_and_idle(gpu_events(partial(run_work, model, work)))
            row |= {
                "busy ms": busy / 1e3,
                "profiled idle us": idle,
                "wall over busy": row["wall ms"] * 1e3 / busy,
            }
    print_rows(rows)
    print(write_result(f"step-gaps-{bundle.stem}", rows))


def busy_and_idle(events: list[Event]) -> tuple[float, float]:
    """Medians over the later half of the steps, microseconds."""
    found = kernels(events)
    last = [
        number
        for number, event in enumerate(found[:-1])
        if LAST_KERNEL in event.name and LAST_KERNEL not in found[number + 1].name
    ]
    last = last[len(last) // 2 :]
    busy = [found[end].end - found[begin + 1].start for begin, end in pairwise(last)]
    idle = [found[number + 1].start - found[number].end for number in last]
    return median(busy), median(idle)


if __name__ == "__main__":
    run_and_leave(main)
