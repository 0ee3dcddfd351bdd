"""Measure the kernels of modules: ``python -m benchmarks.kernels MODULES...``.

MODULES are what ``moec compile --modules-only`` made, for the GPU and for the CPU (its dense segments are the judge of
the GPU's): ``python -m benchmarks.prepare_carry`` makes them for real models. No weights are needed. Every kernel is
held against float64 before it is timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from benchmarks.ceilings import copy_bandwidth, matrix_rate
from benchmarks.kernels.attention_cases import attention_cases
from benchmarks.kernels.cases import measure
from benchmarks.kernels.dense_cases import dense_cases
from benchmarks.kernels.expert_cases import expert_cases
from benchmarks.kernels.module import open_module
from benchmarks.kernels.selection_cases import selection_cases
from benchmarks.kernels.state_cases import state_cases
from benchmarks.support.common import print_rows, write_result
from moec.errors import MoecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.kernels.cases import Case
    from benchmarks.kernels.module import Module

KINDS = ("experts", "attention", "selection", "states", "dense")
FAILURES = (RuntimeError, AssertionError, MoecError)
SMALL_COPY_BYTES, SMALL_MATRIX = 1 << 27, 1024
"""On a CPU, which only tries this program out."""


@click.command()
@click.argument("modules", nargs=-1, type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--only", "kinds", multiple=True, type=click.Choice(KINDS), default=KINDS)
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--name", default="kernels", show_default=True, help="Of the file in results/.")
def main(modules: tuple[Path, ...], kinds: tuple[str, ...], device: str, repeats: int, name: str) -> None:
    """Measure the kernels of MODULES."""
    place = torch.device(device)
    small = place.type == "cpu"
    copy = copy_bandwidth(place, SMALL_COPY_BYTES) if small else copy_bandwidth(place)
    ceilings = {
        "copy GB/s": copy,
        "matrix TFLOP/s": matrix_rate(place, SMALL_MATRIX) if small else matrix_rate(place),
    }
    print(", ".join(f"{what} {rate:.3g}" for what, rate in ceilings.items()))
    rows = [row for folder in modules for row in rows_of(folder, kinds, place, copy, repeats)]
    path = write_result(f"{name}-{place.type}", rows, ceilings=ceilings)
    print_rows(rows)
    print(path)


def rows_of(
    folder: Path, kinds: tuple[str, ...], device: torch.device, copy: float, repeats: int
) -> Iterator[dict[str, Any]]:
    """The rows of one model; where a kernel fails, that is its row: the others are worth seeing."""
    for kind in kinds:
        try:
            module = open_module(folder, device)
            for make in cases(module, folder, kind):
                yield {"model": folder.name} | _row(make, copy, device, repeats)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        except FAILURES as error:
            yield {"model": folder.name, "kernel": kind, "verdict": _failed(error)}


def cases(module: Module, folder: Path, kind: str) -> Iterator[Callable[[], Case]]:
    """What makes each case of a kind."""
    if kind == "experts":
        return expert_cases(module)
    if kind == "attention":
        return attention_cases(module)
    if kind == "selection":
        return selection_cases(module)
    if kind == "states":
        return state_cases(module)
    return dense_cases(module, open_module(folder, torch.device("cpu")))


def _row(make: Callable[[], Case], copy: float, device: torch.device, repeats: int) -> dict[str, Any]:
    case: Case | None = None
    try:
        case = make()
        return measure(case, copy, device, repeats)
    except FAILURES as error:
        name, size = (case.kernel, case.size) if case else (getattr(make, "func", make).__name__, "")
        return {"kernel": name, "size": size, "verdict": _failed(error)}


def _failed(error: Exception) -> str:
    return f"failed: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    main()
