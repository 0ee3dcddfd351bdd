"""Peak GPU memory against the budget, over random budgets, contexts, batches and steps.

    python -m benchmarks.memory_budgets BUNDLE --combinations 200

One process loads BUNDLE again and again. Beside it a thread reads the GPU's used memory from the driver all the time,
so that no stage goes unread: loading, prompts, decoding, closing. What is used before a load is taken off. A
combination passes where the most that was read is within its budget; or, where the budget is too small,
where that is a `BudgetError` and nothing was allocated meanwhile. Afterwards the GPU has to be as it was.

The driver gives memory in blocks of 2 MiB and keeps a pool for kernels' code: what a first load leaves behind (the
context's growth) is reported by itself, and is no part of any model.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click
import numpy as np

from benchmarks.support.budgets import base_bytes, resident_plan
from benchmarks.support.common import print_rows, write_result
from moec import runtime
from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.errors import BudgetError
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver

if TYPE_CHECKING:
    from moec.runtime import Model

PAUSE_SECONDS = 0.0005
KEPT_BYTES = 4 << 20
"""What the driver may keep of all loads together, for kernels that it had not run before."""
MARGINS = (-0.2, 1.2)
"""Least and most of the experts' bytes that a random budget leaves beside everything else: a fifth too little for any,
to more than enough for all."""


@dataclass(frozen=True)
class Combination:
    """What one load is told."""

    share: float
    """Of the experts' bytes, in ``device_memory`` beside what everything else takes."""
    max_batch: int
    step_tokens: int
    cache_tokens: int
    host_memory: str | None
    cpu_threads: int

    def options(self) -> dict[str, Any]:
        """Those that do not depend on the budget."""
        return {
            "device": "cuda:0",
            "max_batch": self.max_batch,
            "max_step_tokens": self.step_tokens,
            "cache_tokens": self.cache_tokens,
            "cpu_threads": self.cpu_threads,
        }


def combinations(count: int, seed: int) -> list[Combination]:
    """Random ones; equal seeds give equal ones."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        batch = int(draw.integers(1, 17))
        made.append(
            Combination(
                share=float(draw.uniform(*MARGINS)),
                max_batch=batch,
                step_tokens=int(max(batch + 1, 2 ** draw.uniform(2, 11))),
                cache_tokens=int(64 * draw.integers(1, 65)),
                host_memory=[None, "64MiB", "16MiB"][int(draw.integers(3))],
                cpu_threads=int(draw.integers(0, 3)),
            )
        )
    return made


class UsedMemory:
    """The GPU's used bytes, read by a thread while it is open."""

    def __init__(self) -> None:
        self._driver = NvidiaDriver()
        self._context = self._driver.retain_context(0)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._peak = self.readings = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._driver.release_context(0)

    def now(self) -> int:
        """Bytes in use."""
        self._driver.use_context(self._context)
        free, total = self._driver.memory_info()
        return total - free

    def peak(self) -> int:
        """The most since the last call."""
        with self._lock:
            peak, self._peak = max(self._peak, self.now()), 0
        return peak

    def _watch(self) -> None:
        while not self._stop.wait(PAUSE_SECONDS):
            with self._lock:
                self._peak = max(self._peak, self.now())
                self.readings += 1


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--combinations", "count", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--new-tokens", default=6, show_default=True)
def main(bundle: Path, count: int, seed: int, new_tokens: int) -> None:
    """Check BUNDLE."""
    start = time.perf_counter()
    with UsedMemory() as used:
        empty = used.now()
        with runtime.load(bundle, device="cuda:0", max_batch=2, cache_tokens=256, verify="sizes") as model:
            work(model, np.random.default_rng(seed), new_tokens)
        grown = used.now()
        rows = [
            row_of(bundle, used, combination, number, new_tokens)
            for number, combination in enumerate(combinations(count, seed))
        ]
        left = used.now() - grown
        facts = {
            "context_bytes": empty,
            "context_growth_bytes": grown - empty,
            "left_behind_bytes": left,
            "readings": used.readings,
            "seconds": time.perf_counter() - start,
            "within": sum(row["verdict"] == "within" for row in rows),
            "refused": sum(row["verdict"] == "refused" for row in rows),
            "offloaded": sum(row["experts"] == "offloaded" for row in rows),
        }
    wrong = [row for row in rows if row["verdict"] not in ("within", "refused")]
    path = write_result(f"memory_budgets-cuda-{bundle.stem}", rows, **facts)
    print_rows(wrong or rows[:12])
    print(f"{facts}\n{path}\n{len(rows) - len(wrong)} of {len(rows)} combinations keep their budget")
    raise SystemExit(bool(wrong) or left > KEPT_BYTES)


def row_of(
    bundle: Path, used: UsedMemory, combination: Combination, number: int, new_tokens: int
) -> dict[str, Any]:
    """Load, work, close; what the driver said meanwhile."""
    options = combination.options() | {"verify": "sizes"}
    full = resident_plan(
        bundle,
        max_batch=combination.max_batch,
        step_tokens=combination.step_tokens,
        cache_tokens=combination.cache_tokens,
    )
    budget = base_bytes(full) + int((full.total_bytes - base_bytes(full)) * combination.share)
    before = used.now()
    used.peak()
    row: dict[str, Any] = {**vars(combination), "budget": budget, "experts": ""}
    try:
        with runtime.load(
            bundle, **options, device_memory=budget, host_memory=combination.host_memory
        ) as model:
            row["planned"] = model.memory.total_bytes
            row["experts"] = "resident" if getattr(model.memory, "slots", None) is None else "offloaded"
            row["loaded"] = used.peak() - before
            work(model, np.random.default_rng(number), new_tokens)
            row["worked"] = used.peak() - before
    except BudgetError as error:
        peak = used.peak() - before
        return row | {
            "loaded": peak,
            "verdict": "refused" if peak <= 0 else f"allocated, then: {error}"[:200],
        }
    row["closed"] = used.now() - before
    peak = max(row["loaded"], row["worked"])
    good = peak <= budget and row["closed"] <= KEPT_BYTES
    return row | {"of budget": peak / budget, "verdict": "within" if good else "over"}


def work(model: Model, draw: np.random.Generator, new_tokens: int) -> None:
    """Prompts of random lengths for as many sequences as the model takes, and some tokens of each."""
    limits = model.engine.limits
    room = min(limits.cache_pages * PAGE_TOKENS // limits.max_batch, limits.max_context) - new_tokens
    lengths = draw.integers(1, max(2, room), limits.max_batch)
    ids = [draw.integers(2, model.record.vocab_size, length).tolist() for length in lengths]
    model.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=[])


if __name__ == "__main__":
    main()
