"""Prompts with experts off the GPU, over the link alone and with the CPU's share, beside the link and the resident run.

    python -m benchmarks.offload_prompts dsv2-lite.moec --share 0.25 --share 0.5

A share is that of the routed experts which have a slot on the GPU. Each length is one step from an empty cache, whose
time ends with its first token; medians of ``--repeats`` behind one that warms up. "link ms" is what all missing bytes
take over the link, the CPU's among them; "over floor" is the time over that, or over the resident prompt's where that
is longer. "token" says whether the likeliest next token is the resident run's. Experts in host memory are read once.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.support.budgets import limit_of_share
from benchmarks.support.common import print_rows, write_result
from benchmarks.support.shared_tier import shared_host_tier
from moec import runtime
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.layout.footprint import footprint
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
from moec.runtime.devices.cuda.measure import measure_gpu
from moec.runtime.engine import Request
from moec.runtime.machine.threads import helper_threads

if TYPE_CHECKING:
    from moec.runtime import Model

HOST_BESIDE_BYTES = 2 << 30
"""Beside all experts. Without a limit a model would count what the tier that it is going to share has taken."""


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--share", "shares", type=float, multiple=True, default=(0.25, 0.5), show_default=True)
@click.option(
    "--tokens",
    "lengths",
    type=click.IntRange(min=1),
    multiple=True,
    default=(32, 64, 128, 256, 512, 1024),
    show_default=True,
)
@click.option(
    "--cpu-threads",
    "modes",
    type=click.IntRange(min=0),
    multiple=True,
    help="[default: 0, and the runtime's]",
)
@click.option("--repeats", default=3, show_default=True)
@click.option("--name", help="Of the result. [default: the bundle's]")
def main(
    bundle: Path,
    shares: tuple[float, ...],
    lengths: tuple[int, ...],
    modes: tuple[int, ...],
    repeats: int,
    name: str | None,
) -> None:
    """Measure BUNDLE."""
    gpu = measure_gpu(NvidiaDriver(), 0)
    opened = open_bundle(bundle, verify="sizes")
    sizes = {"max_batch": 1, "cache_tokens": 2 * max(lengths)}
    step = max(lengths)
    stride = footprint(opened.model).layers[0].stride_bytes
    options: dict[str, Any] = {
        **sizes,
        "device": "cuda:0",
        "max_step_tokens": step,
        "host_memory": footprint(opened.model).experts_bytes + HOST_BESIDE_BYTES,
        "verify": "sizes",
    }
    with runtime.load(bundle, **options) as model:
        resident = {tokens: prompt(model, tokens, repeats) for tokens in lengths}
    rows: list[dict[str, Any]] = []
    with shared_host_tier():
        for share in shares:
            alone: dict[int, float] = {}
            for threads in modes or (0, helper_threads()):
                limit = limit_of_share(bundle, share, threads, step_tokens=step, **sizes)
                with runtime.load(bundle, **options, device_memory=limit, cpu_threads=threads) as model:
                    experts: Any = model._executor and model._executor.sections[0].experts
                    team = list(experts.helper.experts_us) if experts.helper else []
                    for tokens in lengths:
                        ms, token = prompt(model, tokens, repeats)
                        stats = model.stats
                        link = stats.misses * stride / gpu.link_gb_s / 1e6
                        if threads == 0:
                            alone[tokens] = ms
                        rows.append(
                            {
                                "work": f"{tokens} tokens",
                                "slots": f"{share:.0%}",
                                "threads": threads,
                                "ms": ms,
                                "of the link's": ms / alone[tokens] if tokens in alone else None,
                                "CPU": stats.cpu_misses / max(1, stats.misses),
                                "moved MB": stats.bytes_moved / 1e6,
                                "link ms": link,
                                "resident ms": resident[tokens][0],
                                "over floor": ms / max(link, resident[tokens][0]),
                                "token": token == resident[tokens][1],
                                "CPU us": team,
                            }
                        )
                    print_rows(rows[-len(lengths) :])
                    print(model.notes, flush=True)
    path = write_result(f"offload-prompts-{name or bundle.stem}", rows, gpu=vars(gpu))
    print_rows(rows)
    print(path)


def prompt(model: Model, tokens: int, repeats: int) -> tuple[float, int]:
    """Median milliseconds of a prompt's step, and its token; what is counted is one prompt's."""
    random, times = np.random.default_rng(5), []
    request = Request(tuple(random.integers(2, model.record.vocab_size, tokens).tolist()), 1)
    for _ in range(repeats + 1):
        model.stats.reset()
        sequence = model.engine.add(request)
        start = time.perf_counter()
        model.engine.step()
        times.append(time.perf_counter() - start)
        model.engine.cancel(sequence)
    return median(times[1:]) * 1e3, sequence.new_tokens[0]


if __name__ == "__main__":
    main()
