"""Kernels of states for GPUs, in the emulator, against the formulas."""

from __future__ import annotations

import pytest

from moec.artifacts.states import STATE_PREFIX
from moec.compiler.kernels.cuda.states import state
from tests.support.cuda_emulator import Emulated
from tests.support.states import SPECS, StepRunner


@pytest.mark.parametrize("name", SPECS)
def test_agrees_with_the_formulas(name: str) -> None:
    spec = SPECS[name]
    emulated = Emulated(state(spec))
    StepRunner(spec).check(lambda *arrays: emulated(f"{STATE_PREFIX}{spec.name}", *arrays))
