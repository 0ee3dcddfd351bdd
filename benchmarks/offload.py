"""Experts off the GPU: decode and prefill at several budgets, beside the link's speed, with the resident run's bits.

    python -m benchmarks.offload dsv2-lite.moec --share 0 --share 0.25 --share 1

A share is that of the routed experts which have a slot on the GPU. Beside them there is the stage (room for one layer's
experts) and what every model needs. Routing is the model's own (random weights: nearly uniform), or forced: each
token's choices of every layer are written to the GPU before its step, by ``--zipf`` exponents.

With ``--ahead`` experts are brought before their router has spoken, so many bytes a layer at most. With random weights
no router guesses anything, so guesses are drawn beside forced routing: each chosen expert is guessed with the
probability ``--recall`` (0.7: the early router of the trained example), in place of the others come any. "ahead MB" is
what was brought for a token, "taken" the share of it that fetches took. With ``--topical`` tokens choose by what the
text is about at the moment (`moec.planning.synthetic.TOPICAL`), which changes from hundred tokens to hundred tokens.

The floor of a step is the larger of the resident step and that step's missed bytes over "bring GB/s": the link's speed,
or, where the CPU's threads compute a share, what the link brings and those threads read at the same time, since both
draw on one memory; "over floor" is the median over steps. The ceilings are measured in the same process, those of link
and memory anew for each budget, of which the best so far counts. Experts in host memory are read once for all budgets.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import click

from benchmarks.support.common import print_rows, write_result
from benchmarks.support.forced_routing import topical_choices, zipf_choices
from benchmarks.support.offload_run import OffloadRun
from benchmarks.support.shared_tier import shared_host_tier
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.layout.footprint import footprint
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
from moec.runtime.devices.cuda.measure import measure_gpu
from moec.runtime.memory.budget import parse_memory

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
AIM = 1.15
OWN = "model"
"""Name of the routing that nothing forces."""


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--share", "shares", type=float, multiple=True, default=SHARES, show_default=True)
@click.option(
    "--budget", "budgets", multiple=True, help="Bytes of GPU memory, such as 8GiB, besides the shares."
)
@click.option("--zipf", "exponents", type=float, multiple=True, default=(0.6, 1.0), show_default=True)
@click.option("--warm-steps", default=48, show_default=True)
@click.option("--steps", default=24, show_default=True)
@click.option("--beside/--after", default=True, help="Compute experts as they arrive, or when all are there.")
@click.option(
    "--cpu-threads",
    "modes",
    type=click.IntRange(min=0),
    multiple=True,
    default=(0,),
    show_default=True,
    help="Threads that compute a share of the missing experts; 0: all go over the link.",
)
@click.option(
    "--copy-thread",
    "feeds",
    type=bool,
    multiple=True,
    default=(False,),
    show_default=True,
    help="Whether one more feeds the copy engine; the GPU reads host memory itself without.",
)
@click.option(
    "--ahead",
    "bounds",
    type=click.IntRange(min=0),
    multiple=True,
    default=(0,),
    show_default=True,
    help="Bytes of the next layer's experts to bring ahead; 0: none.",
)
@click.option(
    "--topical/--no-topical", default=False, show_default=True, help="Choices by changing topics too."
)
@click.option("--recall", default=0.7, show_default=True, help="Of the drawn guesses.")
@click.option("--name", help="Of the result. [default: the bundle's]")
def main(
    bundle: Path,
    shares: tuple[float, ...],
    budgets: tuple[str, ...],
    exponents: tuple[float, ...],
    warm_steps: int,
    steps: int,
    beside: bool,
    modes: tuple[int, ...],
    feeds: tuple[bool, ...],
    bounds: tuple[int, ...],
    topical: bool,
    recall: float,
    name: str | None,
) -> None:
    """Measure BUNDLE."""
    gpu = measure_gpu(NvidiaDriver(), 0)
    print(gpu, flush=True)
    facts = footprint(open_bundle(bundle, verify="sizes").model)
    routings = {OWN: None} | {
        f"zipf {exponent:g}": zipf_choices(facts, exponent, warm_steps + steps) for exponent in exponents
    }
    if topical:
        routings["topical"] = topical_choices(facts, warm_steps + steps)
    run = OffloadRun(
        bundle=bundle,
        facts=facts,
        routings=routings,
        warm_steps=warm_steps,
        steps=steps,
        beside=beside,
        link=gpu.link_gb_s,
        recall=recall,
    )
    rows: list[dict[str, Any]] = []
    with shared_host_tier():
        limits = [run.limit_of(share) for share in sorted(shares, reverse=True)]
        for limit in [*limits, *(parse_memory(budget, 0, "--budget") for budget in budgets)]:
            ways = list(product(modes, feeds, bounds))
            for threads, fed, bound in ways if limit is not None else ways[:1]:
                rows += run.measure(limit, threads, bound, fed=fed)
                print_rows(rows[-len(routings) - 1 :])
    path = write_result(f"offload-{name or bundle.stem}", rows, gpu=vars(gpu) | {}, aim=AIM)
    print_rows([row for row in rows if row["work"] == "decode"])
    print_rows([row for row in rows if row["work"] != "decode"])
    print(path)


if __name__ == "__main__":
    main()
