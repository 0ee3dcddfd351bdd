"""Compile in tests: quietly, for this machine's CPU."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from moec.cli.output import ProgressBar, StageLog
from moec.cli.probe import RuntimeProbe
from moec.compiler.lowering import targets as targets_module
from moec.compiler.pipeline import compile_model
from moec.compiler.request import Calibration, CompileRequest, Surroundings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.quantization import Quantization
from moec.artifacts.files.manifest import Manifest


def compile_checkpoint(
    model: Path | str,
    output: Path,
    *,
    dtype: str | None = None,
    targets: tuple[str, ...] = ("cpu",),
    calibrate: bool = False,
    modules_only: bool = False,
    force: bool = False,
    max_context: int | None = None,
    machines: tuple[MachineRecord, ...] = (),
    quantization: Quantization | None = None,
) -> Manifest:
    """``compile_model`` with what a test cares about; ``cpu`` computes in float32 whatever machine it is."""
    request = CompileRequest(
        model=str(model),
        output=output,
        targets=targets,
        calibration=Calibration(enabled=calibrate),
        dtype=dtype,
        max_context=max_context,
        modules_only=modules_only,
        force=force,
        quantization=quantization,
    )
    around = Surroundings(StageLog(quiet=True), ProgressBar("pack"), RuntimeProbe(), machines)
    with _without_bfloat16_products():
        return compile_model(request, around)


@contextmanager
def _without_bfloat16_products() -> Iterator[None]:
    """``cpu`` is the best level below the one that rounds activations (decision 42): bounds hold on all machines."""
    flags = targets_module._host_flags()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets_module, "_host_flags", lambda: flags - {"avx512_bf16"})
        yield
