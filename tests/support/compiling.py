"""Compile in tests: quietly, for this machine's CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.cli.output import ProgressBar, StageLog
from moec.cli.probe import RuntimeProbe
from moec.compiler.pipeline import compile_model
from moec.compiler.request import Calibration, CompileRequest, Surroundings

if TYPE_CHECKING:
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
    """``compile_model`` with what a test cares about."""
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
    return compile_model(request, around)
