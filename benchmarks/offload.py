"""Experts off the GPU: decode and prefill at several budgets, beside the link's speed, with the resident run's bits.

    python -m benchmarks.offload dsv2-lite.moec --share 0 --share 0.25 --share 1

A share is that of the routed experts which have a slot on the GPU. Beside them there is the stage (room for one layer's
experts) and what every model needs. Routing is the model's own (random weights: nearly uniform), or forced: each
token's choices of every layer are written to the GPU before its step, by ``--zipf`` exponents.

With ``--ahead`` experts are brought before their router has spoken, so many bytes a layer at most. With random weights
no router guesses anything, so guesses are drawn beside forced routing: each chosen expert is guessed with the
probability ``--recall`` (0.7: the early router of the trained example), in place of the others come any. "ahead MB" is
what was brought for a token, "taken" the share of it that fetches took.

The floor of a step is the larger of the resident step and that step's missed bytes over the link's speed, plus the
speed at which the CPU's threads read memory where they compute a share; "over floor" is the median over steps. The
ceilings are measured in the same process, those of link and memory anew for each budget, of which the best so far
counts. Experts in host memory are read once for all budgets.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.support.budgets import base_bytes, share_limit
from benchmarks.support.common import print_rows, write_result
from benchmarks.support.forced_routing import ForcedRouting, drawn_guesses, zipf_choices
from benchmarks.support.shared_tier import shared_host_tier
from moec import runtime
from moec.artifacts.footprint import footprint
from moec.artifacts.reader import open_bundle
from moec.runtime.devices.cuda.measure import measure_gpu
from moec.runtime.devices.cuda.nvidia import NvidiaDriver
from moec.runtime.devices.measure import read_bandwidth
from moec.runtime.engine import Request
from moec.runtime.experts import ahead
from moec.runtime.memory.budget import parse_memory
from moec.runtime.memory.device_budget import DevicePlan
from moec.runtime.sampling import Sampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.artifacts.footprint import Footprint
    from moec.runtime import Model

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
AIM = 1.15
PROMPT_TOKENS = 512
SHORT_TOKENS = 40
"""Of a prompt that the kernels of the cache take in one step."""
HOST_BYTES = 1 << 30
HOST_BESIDE_BYTES = 2 << 30
"""Beside all experts. Without a limit a model would count what the tier that it is going to share has taken."""
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
    "--ahead",
    "bounds",
    type=click.IntRange(min=0),
    multiple=True,
    default=(0,),
    show_default=True,
    help="Bytes of the next layer's experts to bring ahead; 0: none.",
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
    bounds: tuple[int, ...],
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
    run = _Run(bundle, facts, routings, warm_steps, steps, beside, gpu.link_gb_s, recall)
    rows: list[dict[str, Any]] = []
    with shared_host_tier():
        limits = [run.limit_of(share) for share in sorted(shares, reverse=True)]
        for limit in [*limits, *(parse_memory(budget, 0, "--budget") for budget in budgets)]:
            pairs = [(threads, bound) for threads in modes for bound in bounds]
            for threads, bound in pairs if limit is not None else pairs[:1]:
                rows += run.measure(limit, threads, bound)
                print_rows(rows[-len(routings) - 1 :])
    path = write_result(f"offload-{name or bundle.stem}", rows, gpu=vars(gpu) | {}, aim=AIM)
    print_rows([row for row in rows if row["work"] == "decode"])
    print_rows([row for row in rows if row["work"] != "decode"])
    print(path)


class _Run:
    """One bundle, measured with all its experts on the GPU first."""

    def __init__(
        self,
        bundle: Path,
        facts: Footprint,
        routings: dict[str, NDArray[np.int64] | None],
        warm_steps: int,
        steps: int,
        beside: bool,
        link: float,
        recall: float,
    ) -> None:
        self._beside = beside
        self._guesses = {
            name: None if choices is None else drawn_guesses(facts, choices, recall)
            for name, choices in routings.items()
        }
        self._bundle, self._facts, self._routings = bundle, facts, routings
        self._link = self._best_link = link
        self._read = self._best_read = 0.0
        self._stride = facts.layers[0].stride_bytes
        self._warm_steps, self._steps = warm_steps, steps
        self._resident: dict[str, float] = {}
        self._said: dict[str, Any] = {}
        with self._load(None) as model:
            assert isinstance(model.memory, DevicePlan)
            self._base = base_bytes(model.memory)
            for routing, choices in routings.items():
                timed, said = self._decode(model, choices, None)
                self._resident[routing] = median(seconds for seconds, _ in timed)
                self._said[routing] = said
            self._prefill_seconds, self._said["prefill"] = self._prefill(model)
        print({name: f"{seconds * 1e3:.3f} ms" for name, seconds in self._resident.items()}, flush=True)

    def limit_of(self, share: float) -> int | None:
        """The budget with slots for a share of the experts; ``None`` for all."""
        return share_limit(self._base, self._facts, share) if share < 1 else None

    def measure(self, limit: int | None, threads: int, bound: int) -> list[dict[str, Any]]:
        """Rows of one budget, with so many bytes a layer brought ahead, for which there is memory besides."""
        self._best_link = max(self._best_link, measure_gpu(NvidiaDriver(), 0).link_gb_s)
        self._link, self._read = self._best_link, 0.0
        if threads:
            self._best_read = max(self._best_read, read_bandwidth(threads, HOST_BYTES))
            self._read = self._best_read
        start = time.perf_counter()
        with self._load(limit, threads, bound) as model:
            loaded = time.perf_counter() - start
            experts: Any = model._executor and model._executor._experts
            experts.beside = self._beside
            assert isinstance(model.memory, DevicePlan)
            memory = {"slots": f"{_slot_share(model.memory):.0%}", "GPU MB": model.memory.total_bytes / 1e6}
            rows = [self._decode_row(model, routing) for routing in self._routings]
            rows.append(self._prefill_row(model))
            team = list(experts.helper.experts_us) if threads and limit is not None else []
        return [
            memory | row | {"threads": threads, "ahead": bound, "load s": loaded, "CPU us": team}
            for row in rows
        ]

    def _load(self, limit: int | None, threads: int = 0, bound: int = 0) -> Model:
        extra = 0
        if limit is not None and bound:
            ahead.UNKNOWN_BOUND_BYTES = bound  # a random bundle has no schedule that would say it
            plan = ahead.plan_ahead(open_bundle(self._bundle, verify="sizes"), self._facts, None, True)
            extra = 0 if plan is None else plan.size_bytes
        return runtime.load(
            self._bundle,
            device="cuda:0",
            device_memory=None if limit is None else limit + extra,
            prefetch=bound > 0,
            host_memory=self._facts.experts_bytes + HOST_BESIDE_BYTES,
            max_batch=1,
            max_step_tokens=PROMPT_TOKENS,
            cache_tokens=2 * PROMPT_TOKENS,
            verify="sizes",
            cpu_threads=threads,
        )

    def _decode_row(self, model: Model, routing: str) -> dict[str, Any]:
        steps, said = self._decode(model, self._routings[routing], self._guesses[routing])
        stats = model.stats
        brought = stats.prefetch.fetched_bytes
        hit_rate, by_cpu = stats.hit_rate, stats.cpu_misses * self._stride / len(steps)
        missed = mean(size for _, size in steps)
        resident = self._resident[routing]
        speed = (self._link + self._read) * 1e9
        ratios = [seconds / max(resident, size / speed) for seconds, size in steps]
        return {
            "work": "decode",
            "routing": routing,
            "hit rate": hit_rate,
            "missed MB": missed / 1e6,
            "CPU MB": by_cpu / 1e6,
            "ahead MB": brought / len(steps) / 1e6,
            "taken": 1 - stats.prefetch.wasted_bytes / brought if brought else 0.0,
            "ms": mean(seconds for seconds, _ in steps) * 1e3,
            "link ms": missed / self._link / 1e6,
            "read GB/s": self._read,
            "resident ms": resident * 1e3,
            "over floor": median(ratios),
            "best": min(ratios),
            "worst": max(ratios),
            "same bits": said == self._said[routing],
        }

    def _prefill_row(self, model: Model) -> dict[str, Any]:
        seconds, said = self._prefill(model)
        link = model.stats.bytes_moved / self._link / 1e6
        floor = max(link, self._prefill_seconds * 1e3)
        return {
            "work": f"{PROMPT_TOKENS} tokens",
            "missed MB": model.stats.bytes_moved / 1e6,
            "ms": seconds * 1e3,
            "link ms": link,
            "resident ms": self._prefill_seconds * 1e3,
            "over floor": seconds * 1e3 / floor,
            "link GB/s": self._link,
            "same bits": said == self._said["prefill"],
        }

    def _decode(
        self, model: Model, choices: NDArray[np.int64] | None, guesses: NDArray[np.float32] | None
    ) -> tuple[list[tuple[float, int]], Any]:
        """Seconds and missed bytes of each step after the warm ones, and all tokens."""
        total = self._warm_steps + self._steps
        request = Request((7, 11, 13, 17), total + 2, 0, frozenset(), Sampling(), 0)
        with ForcedRouting(model, choices, guesses) as forced:
            engine = model.engine
            sequence = engine.add(request)
            engine.step()
            steps: list[tuple[float, int]] = []
            for step in range(total):
                forced.step(step)
                if step == self._warm_steps:
                    model.stats.reset()
                before = model.stats.misses if step >= self._warm_steps else 0
                start = time.perf_counter()
                engine.step()
                seconds = time.perf_counter() - start
                if step >= self._warm_steps:
                    steps.append((seconds, (model.stats.misses - before) * self._stride))
            engine.cancel(sequence)
        return steps, list(sequence.new_tokens[: total + 1])

    def _prefill(self, model: Model) -> tuple[float, Any]:
        """Median seconds of a prompt's step, and what it and a short prompt come to."""
        prompt = np.random.default_rng(5).integers(2, model.record.vocab_size, PROMPT_TOKENS).tolist()
        times: list[float] = []
        tokens: list[int] = []
        for _ in range(3):
            model.stats.reset()
            sequence = model.engine.add(Request(tuple(prompt), 2, 0, frozenset(), Sampling(), 0))
            start = time.perf_counter()
            model.engine.step()
            times.append(time.perf_counter() - start)
            model.engine.cancel(sequence)
            tokens = list(sequence.new_tokens)
        moved = model.stats.bytes_moved
        logits = model.forward([prompt[:SHORT_TOKENS]]).tobytes(), model.forward([prompt[:128]]).tobytes()
        model.stats.reset()
        model.stats.bytes_moved = moved
        return median(times), (tokens, logits)


def _slot_share(plan: DevicePlan) -> float:
    """Of the experts, those with a slot."""
    if plan.slots is None:
        return 1.0
    layers = plan.slots.layers
    return sum(layer.slots for layer in layers) / sum(layer.experts for layer in layers)


if __name__ == "__main__":
    main()
