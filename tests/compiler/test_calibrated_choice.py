"""When experts are rounded by what enters them: what that needs, and what is said where there is nothing to round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moec.cli import compile as command_line
from moec.cli.formats import read_method
from moec.compiler.calibration.rounding import check_calibrated, rounds_any
from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.choose_formats import choose_formats
from moec.compiler.quantization import policy_named, quantize
from moec.compiler.request import Calibration, CompileRequest, FitRequest
from moec.errors import CompileError, UsageError
from moec.formats import METHODS
from tests.support.feedback import CALIBRATION, FEEDBACK
from tests.support.graphs import parts
from tests.support.notes import Notes
from tests.support.tiny_models import save


def test_what_it_needs() -> None:
    model = quantize(parts("mixtral"), FEEDBACK).model
    check_calibrated("feedback", model, CALIBRATION, modules_only=False)
    with pytest.raises(UsageError, match="--modules-only"):
        check_calibrated("feedback", model, CALIBRATION, modules_only=True)
    with pytest.raises(UsageError, match="--calibration none"):
        check_calibrated("feedback", model, Calibration(enabled=False), modules_only=False)
    for plain in (parts("mixtral").model, quantize(parts("mixtral"), policy_named("mxfp4")).model):
        assert not rounds_any(plain)
    assert rounds_any(model)
    encoder = replace(model, encoder=model.steps)
    with pytest.raises(CompileError, match="it has an encoder"):
        check_calibrated("feedback", encoder, CALIBRATION, modules_only=False)


def test_formats_that_leave_nothing_to_round(tmp_path: Path) -> None:
    """Named ones are refused; fitted ones, which a person cannot foresee, are rounded to nearest, and that is said."""
    checkpoint = open_checkpoint(save("mixtral", tmp_path / "checkpoint"))
    made, log = parts("mixtral"), Notes()
    made = replace(made, packing=replace(made.packing, config_sha256=checkpoint.config_sha256))
    request = CompileRequest(str(checkpoint.path), tmp_path / "out", ("cpu",), CALIBRATION, method="feedback")
    named = replace(request, quantization=policy_named("mxfp4"))
    with pytest.raises(UsageError, match="none get such a format"):
        choose_formats(made, checkpoint, named, ("cpu",), log)
    whole = replace(request, fit=FitRequest("1GiB", limit_bytes=1 << 30))
    found = choose_formats(made, checkpoint, whole, ("cpu",), log)
    assert found.packing.quantization is None
    assert "has nothing to do" in log.notes[-1]
    everything = found.packing.fit.resident_bytes if found.packing.fit else 0
    tight = replace(request, fit=FitRequest("x", limit_bytes=everything * 4 // 5))
    found = choose_formats(made, checkpoint, tight, ("cpu",), log)
    assert found.packing.quantization is not None
    assert found.packing.quantization.method == "feedback"
    with pytest.raises(UsageError, match="--modules-only"):
        choose_formats(made, checkpoint, replace(tight, modules_only=True), ("cpu",), log)


def test_the_command_line_knows_the_methods() -> None:
    assert sorted(METHODS) == list(command_line.METHODS)
    assert read_method("feedback", chosen=True) == "feedback"
    with pytest.raises(UsageError, match="--method has nothing to say"):
        read_method("feedback", chosen=False)
