"""What recording the routing (`trace_path=`) costs decoding steps on a GPU.

    python -m benchmarks.recording dsv2.moec --share 1 --share 0.25

Three ways take turns with one model: nothing is recorded; the steps keep their routing; the host reads every layer, as
where there is no room to keep it. Medians.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from benchmarks.sampling import step_seconds
from benchmarks.support.budgets import base_bytes, share_limit
from benchmarks.support.common import print_rows, write_result
from moec import runtime
from moec.artifacts.layout.footprint import footprint
from moec.runtime import Sampling
from moec.runtime.memory.device_budget import DevicePlan

if TYPE_CHECKING:
    from moec.runtime import Model

WAYS = ("nothing", "kept by the step", "read by the host")
ROUNDS = 3


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--share", "shares", type=float, multiple=True, default=(1.0, 0.25), show_default=True)
@click.option("--steps", default=32, show_default=True, help="Of each way in each of the rounds.")
def main(bundle: Path, shares: tuple[float, ...], steps: int) -> None:
    """Measure BUNDLE with slots for shares of its experts, missing ones over the link."""
    rows: list[dict[str, Any]] = []
    with _load(bundle, None) as model:
        assert isinstance(model.memory, DevicePlan)
        base, facts = base_bytes(model.memory), footprint(model.record)
        rows += _rows(model, 1.0, steps) if 1.0 in shares else []
    for share in shares:
        if share < 1:
            with _load(bundle, share_limit(base, facts, share)) as model:
                rows += _rows(model, share, steps)
    path = write_result(f"recording-cuda-{bundle.stem}", rows)
    print_rows(rows)
    print(path)


def _load(bundle: Path, limit: int | None) -> Model:
    options: dict[str, Any] = {
        "max_batch": 1,
        "max_step_tokens": 512,
        "cache_tokens": 1024,
        "verify": "sizes",
    }
    return runtime.load(bundle, device="cuda:0", device_memory=limit, cpu_threads=0, **options)


def _rows(model: Model, share: float, steps: int) -> list[dict[str, Any]]:
    executor: Any = model._executor
    assert model._recording is not None
    log = executor.sections[0].log
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            for way in WAYS:
                executor.sections[0].log = None if way == "read by the host" else log
                executor.recorder = None
                if way != "nothing":
                    model.record_routing(Path(folder) / f"{number}.npz")
                times[way].append(step_seconds(model.engine, Sampling(), 1, steps))
        model._recording.stop()
        return [
            {"slots": f"{share:.0%}", "recorded": way, "ms/step": median(seconds) * 1e3}
            for way, seconds in times.items()
        ]


if __name__ == "__main__":
    main()
