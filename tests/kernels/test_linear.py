from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.kernels import reference
from moec.compiler.kernels.cpu.linear import linear

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = 2e-6
Compile = Callable[[Any, int], Callable[..., None]]
Guard = Callable[[torch.Tensor], torch.Tensor]

CASES = [
    (16, "bfloat16", 37, 70, None, True),
    (16, "float16", 3, 5, None, False),
    (16, "float32", 20, 33, 3, True),
    (8, "bfloat16", 20, 33, 3, False),
    (8, "float16", 37, 70, None, True),
    (8, "float32", 150, 130, None, False),
    (4, "bfloat16", 3, 5, None, True),
    (4, "float16", 37, 71, None, False),
    (4, "float32", 1, 1, None, True),
]


@pytest.mark.parametrize(("lanes", "dtype", "rows", "columns", "batch", "bias"), CASES)
def test_linear_matches_the_reference(
    compiled: Compile,
    guarded: Guard,
    lanes: int,
    dtype: str,
    rows: int,
    columns: int,
    batch: int | None,
    bias: bool,
) -> None:
    kernel = compiled(
        linear(rows=rows, columns=columns, dtype=dtype, batch=batch, bias=bias, lanes=lanes), lanes
    )
    lead = () if batch is None else (batch,)
    generator = torch.Generator().manual_seed(rows)
    for tokens in (1, 2, 7, 33, 150):
        x = guarded(torch.randn(*lead, tokens, columns, generator=generator))
        weight = guarded(torch.randn(*lead, rows, columns, generator=generator).to(DTYPES[dtype]))
        offset = guarded(torch.randn(*lead, rows, generator=generator))
        out = guarded(torch.full((*lead, tokens, rows), 7.0))
        kernel(x, weight, *([offset] if bias else []), out)
        expected = reference.linear(
            x.double().numpy(), weight.double().numpy(), offset.double().numpy() if bias else None
        )
        error = np.abs(out.double().numpy() - expected).max() / np.abs(expected).max()
        assert error < TOLERANCE, tokens


def test_special_values_stay_what_they_are(compiled: Compile) -> None:
    kernel = compiled(linear(rows=3, columns=20, dtype="bfloat16", batch=None, bias=False, lanes=8), 8)
    weight = torch.zeros(3, 20, dtype=torch.bfloat16)
    weight[:, 0] = torch.tensor([1.0, float("nan"), float("inf")])
    x = torch.zeros(1, 20)
    x[0, 0] = 1.0
    out = torch.zeros(1, 3)
    kernel(x, weight, out)
    assert out[0, 0] == 1.0
    assert out[0, 1].isnan()
    assert out[0, 2] == float("inf")


@pytest.mark.parametrize(("lanes", "dtype"), [(16, "bfloat16"), (4, "float16"), (8, "float16")])
def test_every_stored_number_is_read_exactly(compiled: Compile, lanes: int, dtype: str) -> None:
    bits = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16)
    weight = bits.view(DTYPES[dtype]).reshape(-1, 1).clone()
    rows = len(weight)
    kernel = compiled(linear(rows=rows, columns=1, dtype=dtype, batch=None, bias=False, lanes=lanes), lanes)
    out = torch.zeros(1, rows)
    kernel(torch.ones(1, 1), weight, out)
    expected = weight.float().reshape(1, -1)
    same = (out == expected) | (out.isnan() & expected.isnan())
    assert same.all(), weight[~same.reshape(-1)][:4]
