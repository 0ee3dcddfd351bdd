"""One bundle's decode and prefill at several budgets of GPU memory, as `benchmarks.offload` says them."""

from __future__ import annotations

import time
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.support.budgets import base_bytes, share_limit
from benchmarks.support.forced_routing import ForcedRouting, drawn_guesses
from benchmarks.support.host_ceiling import read_beside_link
from moec import runtime
from moec.artifacts.files.reader import open_bundle
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
from moec.runtime.devices.cuda.measure import measure_gpu
from moec.runtime.devices.measure import read_bandwidth
from moec.runtime.engine import Request
from moec.runtime.experts import ahead
from moec.runtime.memory.device_budget import DevicePlan
from moec.runtime.sampling import Sampling

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from moec.artifacts.layout.footprint import Footprint
    from moec.runtime import Model

PROMPT_TOKENS = 512
SHORT_TOKENS = 40
"""Of a prompt that the kernels of the cache take in one step."""
HOST_BYTES = 1 << 30
HOST_BESIDE_BYTES = 2 << 30
"""Beside all experts. Without a limit a model would count what the tier that it is going to share has taken."""


class OffloadRun:
    """One bundle, measured with all its experts on the GPU first.

    Args:
        bundle: the measured one.
        facts: its footprint.
        routings: choices that are forced, by a name; None: the model's own.
        warm_steps: decoding steps before those that count.
        steps: those that count.
        beside: experts are computed as they arrive, not when all are there.
        link: GB/s to the GPU.
        recall: of the drawn guesses.
    """

    def __init__(
        self,
        *,
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
        self._bring = self._best_together = 0.0
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

    def measure(self, limit: int | None, threads: int, bound: int, *, fed: bool) -> list[dict[str, Any]]:
        """Rows of one budget, with so many bytes a layer brought ahead, for which there is memory besides.

        ``fed``: a thread feeds the copy engine.
        """
        self._best_link = max(self._best_link, measure_gpu(NvidiaDriver(), 0).link_gb_s)
        self._link, self._read = self._best_link, 0.0
        self._bring = self._link
        if threads:
            self._best_read = max(self._best_read, read_bandwidth(threads, HOST_BYTES))
            beside = read_beside_link(NvidiaDriver(), 0, threads)
            self._best_together = max(self._best_together, beside.together, self._best_read)
            self._read, self._bring = self._best_read, self._best_together
        start = time.perf_counter()
        with self._load(limit, threads, bound, fed=fed) as model:
            loaded = time.perf_counter() - start
            experts: Any = model._executor and model._executor.sections[0].experts
            experts.beside = self._beside
            assert isinstance(model.memory, DevicePlan)
            memory = {"slots": f"{_slot_share(model.memory):.0%}", "GPU MB": model.memory.total_bytes / 1e6}
            rows = [self._decode_row(model, routing) for routing in self._routings]
            rows.append(self._prefill_row(model))
            helper = None if limit is None else experts.helper
            team = [] if helper is None else list(helper.experts_us)
        return [
            memory | row | {"threads": threads, "fed": fed, "ahead": bound, "load s": loaded, "CPU us": team}
            for row in rows
        ]

    def _load(self, limit: int | None, threads: int = 0, bound: int = 0, *, fed: bool = False) -> Model:
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
            copy_thread=fed,
        )

    def _decode_row(self, model: Model, routing: str) -> dict[str, Any]:
        steps, said = self._decode(model, self._routings[routing], self._guesses[routing])
        stats = model.stats
        brought = stats.prefetch.fetched_bytes
        hit_rate, by_cpu = stats.hit_rate, stats.cpu_misses * self._stride / len(steps)
        missed = mean(size for _, size in steps)
        resident = self._resident[routing]
        floors = [max(resident, size / self._bring / 1e9) for _, size in steps]
        ratios = [seconds / floor for (seconds, _), floor in zip(steps, floors, strict=True)]
        return {
            "work": "decode",
            "routing": routing,
            "hit rate": hit_rate,
            "missed MB": missed / 1e6,
            "CPU MB": by_cpu / 1e6,
            "engine MB": stats.engine_bytes / len(steps) / 1e6,
            "late": stats.late_orders,
            "ahead MB": brought / len(steps) / 1e6,
            "taken": 1 - stats.prefetch.wasted_bytes / brought if brought else 0.0,
            "ms": mean(seconds for seconds, _ in steps) * 1e3,
            "link ms": missed / self._link / 1e6,
            "read GB/s": self._read,
            "bring GB/s": self._bring,
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
            sequence = model.engine.add(Request(tuple(prompt), 1, 0, frozenset(), Sampling(), 0))
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
