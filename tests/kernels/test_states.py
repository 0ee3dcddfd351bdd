"""Kernels of states against the formulas: prefills in one step and in several, decodes, rows used again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moec.compiler.kernels.cpu.states import state
from tests.support.states import SPECS, StepRunner, torch_arguments

Compile = Callable[[Any, int], Callable[..., None]]


@pytest.mark.parametrize("lanes", [16, 8, 4])
@pytest.mark.parametrize("name", SPECS)
def test_agrees_with_the_formulas(name: str, lanes: int, compiled: Compile) -> None:
    kernel = compiled(state(SPECS[name], lanes=lanes), lanes)
    StepRunner(SPECS[name]).check(lambda *tensors: kernel(*torch_arguments(*tensors)))
