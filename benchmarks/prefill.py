"""Prompts end to end, beside their arithmetic at the rate of torch's products, and transformers in the same run.

python -m benchmarks.prefill benchmarks/configs/deepseek-v2-lite.json --bundle dsv2.moec --device cuda:0

MODEL and --bundle as for ``benchmarks.decode``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from benchmarks.support.children import ENGINE, TRANSFORMERS, fastest, run_child
from benchmarks.support.common import print_rows, write_result
from benchmarks.support.preparing import bundle_of, product_rate, transformers_model
from benchmarks.support.work import Work
from moec.artifacts.files.reader import open_bundle
from moec.planning.costs.work import step_work
from moec.runtime.devices.measure import gpu_record

PROMPTS = (512, 2048, 4096)
AIM = 2.0
"""Most time over the floor, of 2,048 tokens and more."""
AIMED_TOKENS = 2048
NEW_TOKENS = 2


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--bundle", type=click.Path(exists=True, path_type=Path), help="Measure this one.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--device-memory", help="The bundle's budget.")
@click.option("--prompt-tokens", "prompts", type=click.IntRange(min=1), multiple=True, default=PROMPTS)
@click.option(
    "--step-tokens", default=4096, show_default=True, help="Tokens of a step; longer prompts take several."
)
@click.option("--repeats", default=3, show_default=True)
@click.option("--theirs/--no-theirs", default=True, help="Measure transformers too.")
def main(
    model: Path,
    bundle: Path | None,
    device: str,
    device_memory: str | None,
    prompts: tuple[int, ...],
    step_tokens: int,
    repeats: int,
    theirs: bool,
) -> None:
    """Measure MODEL."""
    works = [Work(1, tokens, NEW_TOKENS) for tokens in prompts]
    options = ["--device", device, "--repeats", str(repeats)]
    own = ["--step-tokens", str(step_tokens), *(["--device-memory", device_memory] if device_memory else [])]
    with bundle_of(model, bundle) as folder, transformers_model(model) as reference:
        arithmetic = step_work(open_bundle(folder, verify="sizes").model)
        rate = product_rate(device)
        ours = run_child(ENGINE, folder, works, [*options, *own])
        other = run_child(TRANSFORMERS, reference, works, options) if theirs else {"runs": []}
    rows = []
    for work in works:
        rows += rows_of(work, arithmetic.operations(work.prompt_tokens), rate, ours, other)
    attention = {str(tokens): arithmetic.attention_operations(tokens) / 1e12 for tokens in prompts}
    facts = {"matrix_tflop_s": rate, "attention_tflop": attention, "errors": other.get("errors", {})}
    if device != "cpu":
        facts["gpu"] = vars(gpu_record(device))
    path = write_result(
        f"prefill-{device.partition(':')[0]}-{model.stem}", rows, **facts, ours=ours, theirs=other
    )
    print_rows(rows)
    print(f"{facts}\n{path}")


def rows_of(
    work: Work, flops: float, rate: float, ours: dict[str, Any], theirs: dict[str, Any]
) -> list[dict[str, Any]]:
    """Floor, moec, transformers."""
    floor = flops / rate / 1e9
    tokens = work.prompt_tokens
    rows = [{"tokens": tokens, "system": f"floor: {flops / 1e12:.2f} TFLOP", "ms": floor, "over floor": 1.0}]
    for name, facts in (("moec", ours), ("transformers", theirs)):
        best = fastest(facts, work, "prefill_seconds")
        if best is not None:
            seconds = best["prefill_seconds"]
            system = f"{name} {best.get('how', '')}".strip()
            row = {
                "tokens": tokens,
                "system": system,
                "ms": seconds * 1e3,
                "over floor": seconds * 1e3 / floor,
            }
            aim = {"aim": AIM} if name == "moec" and tokens >= AIMED_TOKENS else {}
            rows.append(row | {"tokens/s": tokens / seconds} | aim)
    return rows


if __name__ == "__main__":
    main()
