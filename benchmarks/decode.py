"""Decode end to end, beside the memory's speed and transformers in the same run.

    python -m benchmarks.make_checkpoint qwen3-moe-2gb /tmp/qwen3-moe-2gb
    python -m benchmarks.decode /tmp/qwen3-moe-2gb

    python -m benchmarks.decode benchmarks/configs/deepseek-v2-lite.json --bundle dsv2.moec --device cuda:0

MODEL is a checkpoint's folder, compiled first unless --bundle is given; or, on a GPU, a config: transformers then gets
random weights of its shape, as the bundle has (see ``make_checkpoint --bundle``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from benchmarks.support.children import ENGINE, TRANSFORMERS, fastest, run_child
from benchmarks.support.common import print_rows, write_result
from benchmarks.support.preparing import bundle_of, copy_rate, transformers_model
from benchmarks.support.work import Work, WorkType, decode_bytes
from moec.artifacts.files.reader import open_bundle

WORKS = (Work(1, 512, 64), Work(8, 512, 64))
AIMS = {1: 1.25, 8: 1.4}
"""Most time over the floor, by batch."""


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--bundle", type=click.Path(exists=True, path_type=Path), help="Measure this one.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--device-memory", help="The bundle's budget.")
@click.option("--work", "works", type=WorkType(), multiple=True, default=WORKS)
@click.option("--repeats", default=3, show_default=True)
@click.option("--theirs/--no-theirs", default=True, help="Measure transformers too.")
def main(
    model: Path,
    bundle: Path | None,
    device: str,
    device_memory: str | None,
    works: tuple[Work, ...],
    repeats: int,
    theirs: bool,
) -> None:
    """Measure MODEL."""
    options = ["--device", device, "--repeats", str(repeats)]
    memory = ["--device-memory", device_memory] if device_memory else []
    with bundle_of(model, bundle) as folder, transformers_model(model) as reference:
        record = open_bundle(folder, verify="sizes").model
        rate = copy_rate(device)
        ours = run_child(ENGINE, folder, works, [*options, *memory])
        other = run_child(TRANSFORMERS, reference, works, options) if theirs else {"runs": []}
    rows = [
        row for work in works for row in rows_of(work, decode_bytes(record, work.batch), rate, ours, other)
    ]
    facts = {"bandwidth_gb_s": rate, "load": load_facts(ours), "errors": other.get("errors", {})}
    path = write_result(
        f"decode-{device.partition(':')[0]}-{model.stem}", rows, **facts, ours=ours, theirs=other
    )
    print_rows(rows)
    print(f"{facts}\n{path}")


def rows_of(
    work: Work, size_bytes: float, rate: float, ours: dict[str, Any], theirs: dict[str, Any]
) -> list[dict[str, Any]]:
    """Floor, moec, transformers."""
    floor = size_bytes / rate / 1e6
    rows = [
        {
            "work": str(work),
            "system": f"floor: {size_bytes / 1e9:.2f} GB",
            "ms/step": floor,
            "over floor": 1.0,
        }
    ]
    for name, facts in (("moec", ours), ("transformers", theirs)):
        best = fastest(facts, work, "step_seconds")
        if best is not None:
            milliseconds = best["step_seconds"] * 1e3
            system = f"{name} {best.get('how', '')}".strip()
            rows.append(
                {
                    "work": str(work),
                    "system": system,
                    "ms/step": milliseconds,
                    "over floor": milliseconds / floor,
                    "first token ms": best["prefill_seconds"] * 1e3,
                    "tokens/s": work.batch / best["step_seconds"],
                }
                | ({"aim": AIMS.get(work.batch)} if name == "moec" else {})
            )
    return rows


def load_facts(ours: dict[str, Any]) -> dict[str, float]:
    """How long the bundle took to load."""
    return {key: ours[key] for key in ("load_seconds", "load_to_first_token_seconds")}


if __name__ == "__main__":
    main()
