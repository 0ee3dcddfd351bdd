"""Tiles of many tokens: every number of tokens, rows and columns, and what one token's results depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.kernels import reference
from moec.compiler.kernels.cpu.linear import linear
from moec.compiler.kernels.cpu.tiling import STREAM_COLUMNS
from moec.compiler.lowering.tvm_targets import LLVM_FEATURES
from moec.formats import FORMATS, dequantize, pack_rows
from tests.support.formats import random_quantized
from tests.support.machine_code import machine_code
from tests.support.rounded import rounded

Compile = Callable[[Any, int], Callable[..., None]]
Guard = Callable[[torch.Tensor], torch.Tensor]
TOLERANCE = 2e-6
SHAPES = [
    # More than a span of columns, and what is left is no whole group; rows that fill no block.
    ("int4-g32", 16, 53, 1100, None),
    ("int8-g128", 8, 5, 1672, None),
    *(
        pytest.param(*shape, marks=pytest.mark.slow)
        for shape in (
            ("int4-g64-z", 16, 12, 1100, None),
            ("int4-g32-m", 16, 25, 560, None),
            ("mxfp4", 8, 50, 1040, None),
            ("int8-g64", 16, 7, 96, 3),
            ("int4-g128", 16, 49, 2000, None),
        )
    ),
]


@pytest.mark.parametrize(("name", "lanes", "rows", "columns", "batch"), SHAPES)
def test_tiles_match_the_reference(
    compiled: Compile, guarded: Guard, name: str, lanes: int, rows: int, columns: int, batch: int | None
) -> None:
    """Numbers of tokens that fill two tiles, one, or half of one, and those that do not."""
    kind, lead = FORMATS[name], () if batch is None else (batch,)
    kernel = compiled(
        linear(rows=rows, columns=columns, dtype=name, batch=batch, bias=True, lanes=lanes), lanes
    )
    quantized = random_quantized(kind, rows * (batch or 1), columns, lanes)
    values = dequantize(kind, quantized).astype(np.float64).reshape(*lead, rows, columns)
    weight = guarded(torch.from_numpy(pack_rows(kind, quantized)).reshape(*lead, rows, -1))
    for tokens in (7, 8, 9, 16, 17, 25, 32, 43, 150):
        x = torch.randn(*lead, tokens, columns)
        x[..., 3, :] *= 1e20
        x = guarded(x)
        bias = guarded(torch.randn(*lead, rows))
        out = guarded(torch.full((*lead, tokens, rows), 7.0))
        kernel(x, weight, bias, out)
        seen = rounded(x.double().numpy(), kind.group)
        expected = reference.linear(seen, values, bias.double().numpy())
        largest = np.abs(expected).max(-1, keepdims=True)
        assert (np.abs(out.double().numpy() - expected) / largest).max() < TOLERANCE, tokens


@pytest.mark.parametrize(
    ("name", "lanes"), [("int8-g32", 16), pytest.param("int4-g32-z", 8, marks=pytest.mark.slow)]
)
def test_a_token_of_many_is_multiplied_by_itself(compiled: Compile, name: str, lanes: int) -> None:
    """Whatever is beside it, and wherever it lies: numbers of other magnitudes, infinity, NaN."""
    rows, columns, most = 50, 352, 70
    kernel = compiled(
        linear(rows=rows, columns=columns, dtype=name, batch=None, bias=False, lanes=lanes), lanes
    )
    kind = FORMATS[name]
    quantized = random_quantized(kind, rows, columns, 3)
    weight = torch.from_numpy(pack_rows(kind, quantized)).clone()
    x = torch.randn(most, columns)
    x[1:5] *= torch.tensor([1e30, 1e-28, 0.0, 1e-42])[:, None]
    x[5, 40], x[6, 7] = torch.inf, torch.nan

    def product(vectors: torch.Tensor) -> torch.Tensor:
        out = torch.full((len(vectors), rows), 7.0)
        kernel(vectors.contiguous(), weight, out)
        return out

    everything = product(x)
    assert everything[[5, 6]].isnan().all()
    assert everything[[0, 1, 2, 3, 4]].isfinite().all()
    assert (everything[3:5] == 0).all()
    values = dequantize(kind, quantized).astype(np.float64)
    tiny = reference.linear(rounded(x[2:3].double().numpy(), kind.group), values)
    assert np.abs(everything[2:3].double().numpy() - tiny).max() / np.abs(tiny).max() < TOLERANCE
    for tokens in (STREAM_COLUMNS + 1, 12, 24, 33):
        order = torch.randperm(most)[:tokens]
        np.testing.assert_array_equal(product(x[order]).numpy(), everything[order].numpy())


@pytest.mark.slow
def test_vnni_gives_the_same_bits(compiled: Compile) -> None:
    """What is added up is exact, whichever instructions do it; for few tokens too."""
    if "avx512_vnni" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this processor has no VNNI")
    rows, columns, kind = 50, 352, FORMATS["int4-g32"]
    function = linear(rows=rows, columns=columns, dtype=kind.name, batch=None, bias=False, lanes=16)
    mcpu, features = LLVM_FEATURES["x86-64-v4-vnni"]
    kernels = [compiled(function, 16), machine_code(function, mcpu=mcpu, mattr=list(features))["linear"]]
    weight = torch.from_numpy(pack_rows(kind, random_quantized(kind, rows, columns, 3))).clone()
    for tokens in (1, 4, 70):
        x, (plain, other) = torch.randn(tokens, columns), torch.zeros(2, tokens, rows)
        for kernel, out in zip(kernels, (plain, other), strict=True):
            kernel(x, weight, out)
        np.testing.assert_array_equal(plain.numpy(), other.numpy())
