from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moec.artifacts.activation import ARITY
from moec.compiler.kernels.cpu.math import VectorMath
from moec.compiler.kernels.emit import Argument, arguments, build, i64, load, loop, store
from moec.compiler.kernels.reference.activation import OPERATORS

SIZE = 4096
Compile = Callable[[Any, int], Callable[..., None]]
SPECIAL = [0.0, -0.0, 100.0, -100.0, 1e4, -1e4, 88.7, -87.3, -103.9, 0.625, -0.625, 3.9, float("nan")]


def _every_operator(lanes: int) -> Any:
    def body() -> None:
        x, y, out = arguments(
            Argument("x", (SIZE,), "float32"),
            Argument("y", (SIZE,), "float32"),
            Argument("out", (len(ARITY), SIZE), "float32"),
        )
        operators = VectorMath(lanes).operators()
        with loop(SIZE // lanes) as step:
            place = step * i64(lanes)
            for number, (name, count) in enumerate(ARITY.items()):
                operands = [load(buffer, place, lanes) for buffer in (x, y)][:count]
                store(out, i64(number * SIZE) + place, operators[name](*operands), lanes)

    return build("every_operator", body)


@pytest.mark.parametrize("lanes", [16, 4, 1])
def test_functions_are_accurate(compiled: Compile, lanes: int) -> None:
    kernel = compiled(_every_operator(lanes), max(4, lanes))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SIZE, generator=generator) * torch.tensor([1.0, 20.0, 1e-3, 5.0]).repeat(SIZE // 4)
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    y = torch.randn(SIZE, generator=generator) * 3
    out = torch.zeros(len(ARITY), SIZE)
    kernel(x, y, out)
    for number, (name, count) in enumerate(ARITY.items()):
        with np.errstate(all="ignore"):
            expected = OPERATORS[name](*(v.double().numpy() for v in (x, y)[:count]))
            wanted = expected.astype(np.float32)
        got = out[number].numpy()
        assert np.array_equal(np.isnan(got), np.isnan(wanted)), name
        finite = np.isfinite(wanted)
        assert np.array_equal(got[~finite], wanted[~finite], equal_nan=True), name
        # GELU's tail is a difference of nearly equal numbers, in float32 as everywhere: absolute there.
        scale = np.abs(x.numpy()) if name.startswith("gelu") else np.abs(wanted)
        normal = finite & (scale > 1e-37)
        error = np.abs(got[normal] - expected[normal]) / scale[normal]
        assert error.max() < 1e-6, name
        if name == "exp":
            assert (got[np.abs(wanted) < np.finfo(np.float32).tiny] == 0).all(), "slow numbers are left out"
