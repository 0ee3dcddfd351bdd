"""A model whose layers are divided among GPUs, beside the same model on one: decode, prompts, equal bits.

    python -m benchmarks.divided dsv2-lite.moec --gpus 2 --budget 4GiB

Of the budget that each GPU has: one GPU with it, one with as much as all have together, all of them; and one and
all of them with every expert resident. Routing is forced by ``--zipf`` (see `benchmarks.offload`), each step alone;
"model" is the model's own, whose steps run ahead of their tokens as they do for a user. "by host" has the GPUs hand
hidden states on through the host's memory, as those do that do not reach each other.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.support.common import print_rows, write_result
from benchmarks.support.forced_routing import ForcedRouting, zipf_choices
from moec import runtime
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.layout.footprint import footprint
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
from moec.runtime.devices.cuda.link import HostLink, link_between
from moec.runtime.devices.cuda.measure import measure_gpu
from moec.runtime.engine import Request
from moec.runtime.loading import links
from moec.runtime.memory.budget import parse_memory
from moec.runtime.memory.device_budget import DevicePlan
from moec.runtime.memory.divided import DividedPlan
from moec.runtime.sampling import Sampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.runtime import Model

PROMPT_TOKENS = 512
WARM_STEPS = 32
OWN = "model"


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--gpus", default=2, show_default=True)
@click.option("--budget", default="4GiB", show_default=True, help="Of each GPU.")
@click.option("--zipf", "exponents", type=float, multiple=True, default=(1.0,), show_default=True)
@click.option("--way", "chosen", multiple=True, help="One of the ways alone; may be repeated.")
@click.option("--steps", default=24, show_default=True)
@click.option(
    "--cpu-threads", default=0, show_default=True, help="That compute a share of the missing experts."
)
@click.option("--prefetch/--no-prefetch", default=False, show_default=True)
@click.option("--name", help="Of the result. [default: the bundle's]")
def main(
    bundle: Path,
    gpus: int,
    budget: str,
    exponents: tuple[float, ...],
    chosen: tuple[str, ...],
    steps: int,
    cpu_threads: int,
    prefetch: bool,
    name: str | None,
) -> None:
    """Measure one bundle."""
    facts = footprint(open_bundle(bundle, verify="sizes").model)
    routings: dict[str, NDArray[np.int64] | None] = {
        f"zipf {exponent}": zipf_choices(facts, exponent, WARM_STEPS + steps) for exponent in exponents
    }
    routings[OWN] = None
    size = parse_memory(budget, 0, "--budget")
    several = [f"cuda:{number}" for number in range(gpus)]
    ways: list[tuple[str, list[str], int | None]] = [
        ("one, all", ["cuda:0"], None),
        ("several, all", several, None),
        ("by host, all", several, None),
        ("one", ["cuda:0"], size),
        ("one, as much", ["cuda:0"], gpus * size),
        ("several", several, size),
        ("by host", several, size),
    ]
    rows: list[dict[str, Any]] = []
    answers: dict[str, Any] = {}
    for way, devices, limit in [each for each in ways if not chosen or each[0] in chosen]:
        rows += _measure(bundle, way, devices, limit, routings, steps, cpu_threads, prefetch, answers)
        print_rows(rows[-len(routings) - 1 :])
    measured = [measure_gpu(NvidiaDriver(), number).link_gb_s for number in range(gpus)]
    print_rows(rows)
    print(write_result(f"divided-{name or bundle.stem}", rows, gpus=gpus, budget=size, link_gb_s=measured))


def _measure(
    bundle: Path,
    way: str,
    devices: list[str],
    limit: int | None,
    routings: dict[str, NDArray[np.int64] | None],
    steps: int,
    cpu_threads: int,
    prefetch: bool,
    answers: dict[str, Any],
) -> list[dict[str, Any]]:
    """Rows of one way; the first one's ``answers`` are those of all."""
    module: Any = links
    if way.startswith("by host"):
        module.link_between = HostLink
    start = time.perf_counter()
    try:
        model = runtime.load(
            bundle,
            device=devices,
            device_memory=limit,
            prefetch=prefetch,
            max_batch=1,
            max_step_tokens=PROMPT_TOKENS,
            cache_tokens=2 * PROMPT_TOKENS,
            verify="sizes",
            cpu_threads=cpu_threads,
            copy_thread=False,
        )
    finally:
        module.link_between = link_between
    loaded = time.perf_counter() - start
    with model:
        facts = {"way": way, "GB each": None if limit is None else limit / 1e9, "slots": _slots(model)}
        rows = []
        for routing, choices in routings.items():
            seconds, said = _decode(model, choices, steps)
            stats = model.stats
            same = said == answers.setdefault(routing, said)
            moved = stats.bytes_moved / steps / 1e6
            rows.append(
                facts
                | {"work": "decode", "routing": routing, "hit rate": stats.hit_rate, "missed MB": moved}
                | {"ms": seconds * 1e3, "same bits": same, "load s": loaded}
            )
        seconds, said = _prompt(model)
        same = said == answers.setdefault("prompt", said)
        rows.append(
            facts
            | {"work": f"{PROMPT_TOKENS} tokens", "ms": seconds * 1e3, "same bits": same, "load s": loaded}
        )
        print(*model.notes, f"{model.memory.total_bytes / 1e9:.2f} GB", flush=True)
    return rows


def _slots(model: Model) -> str:
    """The share of all experts that have a slot, or are resident."""
    memory = model.memory
    plans = memory.plans if isinstance(memory, DividedPlan) else (memory,)
    kept = everything = 0
    for plan in plans:
        assert isinstance(plan, DevicePlan)
        if plan.slots is None:
            kept, everything = kept + plan.expert_bytes, everything + plan.expert_bytes
        else:
            kept += plan.slots.slot_bytes
            everything += sum(layer.experts * layer.stride_bytes for layer in plan.slots.layers)
    return f"{kept / everything:.0%}"


def _decode(model: Model, choices: NDArray[np.int64] | None, steps: int) -> tuple[float, Any]:
    """Seconds of a step after the warm ones, and all tokens; the model's counters are of those steps."""
    total = WARM_STEPS + steps
    request = Request((7, 11, 13, 17), total + 2, 0, frozenset(), Sampling(), 0)
    engine = model.engine
    sequence = engine.add(request)
    engine.step()
    if choices is None:
        for _ in range(WARM_STEPS):
            engine.step()
        model.stats.reset()
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        seconds = (time.perf_counter() - start) / steps
    else:
        with ForcedRouting(model, choices) as forced:
            times = []
            for step in range(total):
                forced.step(step)
                if step == WARM_STEPS:
                    model.stats.reset()
                start = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - start)
            seconds = float(np.mean(times[WARM_STEPS:]))
    while engine.busy:
        engine.step()
    return seconds, sequence.tokens


def _prompt(model: Model) -> tuple[float, Any]:
    """Seconds of the first token after a long prompt, and some tokens."""
    vocab = model.record.vocab_size
    prompt = [int(token) for token in np.random.default_rng(5).integers(2, vocab, PROMPT_TOKENS - 8)]
    times = []
    for _ in range(4):
        start = time.perf_counter()
        model.generate([prompt], max_new_tokens=1, do_sample=False, eos_token_id=[])
        times.append(time.perf_counter() - start)
    said = model.generate([prompt], max_new_tokens=6, do_sample=False, eos_token_id=[]).tolist()
    return median(times[1:]), said


if __name__ == "__main__":
    main()
