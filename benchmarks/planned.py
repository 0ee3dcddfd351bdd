"""What `moec plan` predicts on this machine, beside what the bundle then does within the same budgets.

    python -m benchmarks.planned dsv2.moec --budget 8GiB --budget 16GiB

For each budget ``moec plan`` runs as a user runs it, in a process of its own: it measures the machine and times the
CPU's experts. It learns from routing that is recorded first, of other random prompts than those that are measured.
BUNDLE keeps the traces and the schedules. Aim: 0.85 to 1.15 of the measured time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.support.common import print_rows, write_result
from moec import runtime
from moec.runtime.engine import Request
from moec.runtime.sampling import Sampling

if TYPE_CHECKING:
    from moec.runtime import Model

AIM = 0.15
RECORDED, MEASURED = range(1, 5), (0,)
"""Seeds of prompts."""
PROMPT_TOKENS, WARM_STEPS = 64, 16


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--budget", "budgets", multiple=True, required=True, help="Of GPU memory, such as 8GiB.")
@click.option(
    "--steps", default=64, show_default=True, help="Decoding steps that are timed, behind some others."
)
@click.option("--device", default="cuda:0", show_default=True)
def main(bundle: Path, budgets: tuple[str, ...], steps: int, device: str) -> None:
    """Measure BUNDLE."""
    rows: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        traces = Path(folder, "traces.npz")
        with runtime.load(
            bundle, device=device, device_memory=budgets[0], trace_path=traces, max_batch=1, verify="sizes"
        ) as model:
            for seed in RECORDED:
                step_seconds(model, seed, steps)
        for budget in budgets:
            schedule = planned(bundle, budget, traces)
            machine = schedule["machine"]
            rows.append({"budget": budget} | measure(bundle, device, schedule, steps))
            print_rows(rows[-1:])
    path = write_result(f"planned-{device.partition(':')[0]}-{bundle.stem}", rows, plan=machine, aim=AIM)
    print_rows(rows)
    print(machine)
    print(path)


def planned(bundle: Path, budget: str, traces: Path) -> dict[str, Any]:
    """The schedule that ``moec plan`` prints and leaves in the bundle.

    Raises:
        RuntimeError: it failed; the message is what it said.
    """
    command = [sys.executable, "-m", "moec", "plan", str(bundle), "--device-memory", budget]
    done = subprocess.run(
        [*command, "--traces", str(traces), "--json"], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"moec plan failed: {done.stderr[-2000:]}")
    schedule: dict[str, Any] = json.loads(done.stdout)
    return schedule


def measure(bundle: Path, device: str, schedule: dict[str, Any], steps: int) -> dict[str, Any]:
    """What the schedule predicts, and what a load within its budgets does."""
    limits = schedule["budgets"]
    with runtime.load(
        bundle,
        device=device,
        device_memory=limits["device_memory_bytes"],
        host_memory=limits["host_memory_bytes"],
        max_batch=1,
        max_step_tokens=limits["step_tokens"],
        cache_tokens=limits["context_tokens"],
        verify="sizes",
    ) as model:
        seconds = [second for seed in MEASURED for second in step_seconds(model, seed, steps)]
        return row_of(schedule, mean(seconds) * 1e3, model.stats.hit_rate)


def row_of(schedule: dict[str, Any], milliseconds: float, hit_rate: float) -> dict[str, Any]:
    """Predicted and measured, side by side."""
    prediction = schedule["prediction"]
    predicted = prediction["milliseconds_per_token"]
    return {
        "slots": sum(layer["slots"] for layer in schedule["layers"]),
        "predicted hits": prediction["hit_rate"],
        "hits": hit_rate,
        "predicted ms": predicted,
        "ms": milliseconds,
        "ratio": predicted / milliseconds,
    }


def step_seconds(model: Model, seed: int, steps: int) -> list[float]:
    """Of each decoding step behind a prompt and some that are not timed; the model's counters are of the same steps."""
    prompt = np.random.default_rng(seed).integers(2, model.record.vocab_size, PROMPT_TOKENS).tolist()
    request = Request(tuple(prompt), WARM_STEPS + steps + 2, 0, frozenset(), Sampling(), seed)
    sequence = model.engine.add(request)
    times = []
    for step in range(1 + WARM_STEPS + steps):
        if step == 1 + WARM_STEPS:
            model.stats.reset()
        start = perf_counter()
        model.engine.step()
        times.append(perf_counter() - start)
    model.engine.cancel(sequence)
    return times[1 + WARM_STEPS :]


if __name__ == "__main__":
    main()
