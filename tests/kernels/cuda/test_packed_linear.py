"""Products with quantized weights, against the numbers that their bytes stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moec.compiler.kernels import reference
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS
from moec.formats import FORMATS, dequantize, pack_rows
from moec.runtime.tensors import aligned_empty
from tests.support.formats import random_quantized
from tests.support.products import Linear

FEW, MANY = 3e-6, 2e-3
"""Most error, relative to the largest: 22 bits of mantissa; or both operands rounded to float16."""
SHAPES = {
    "steps": (37, 256, True),
    "long": (70, 2088, False),
    "short": (20, 8, True),
    "odd": (9, 37, True),
}


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def _check(name: str, kind: str, sizes: tuple[int, ...], *, hopper: bool = False) -> None:
    rows, columns, bias = SHAPES[name]
    kernel = Linear(rows, columns, kind, None, bias, hopper=hopper)
    quantized = random_quantized(FORMATS[kind], rows, columns, 1)
    stored = _aligned(pack_rows(FORMATS[kind], quantized))
    weight = dequantize(FORMATS[kind], quantized).astype(float)
    generator = torch.Generator().manual_seed(rows)
    offset = _aligned(torch.randn(rows, generator=generator).numpy())
    inputs = torch.randn(max(sizes), columns, generator=generator).numpy()
    alone: NDArray[Any] | None = None
    for tokens in sizes:
        x = _aligned(inputs[:tokens])
        out = _aligned(np.full((tokens, rows), 7, np.float32))
        kernel(x, stored, offset if bias else None, out)
        expected = reference.linear(x.astype(float), weight, offset.astype(float) if bias else None)
        error = np.abs(out - expected).max() / np.abs(expected).max()
        assert error < (FEW if tokens <= 8 else MANY), tokens
        if tokens <= FEW_TOKENS:
            alone = out[:1] if alone is None else alone
            assert np.array_equal(out[:1], alone), "a token has the same bits whoever is beside it"


@pytest.mark.parametrize("name", ["steps", "short"])
def test_an_int8_product(name: str) -> None:
    _check(name, "int8-g128", (1, 3, 8))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FORMATS))
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_products_of_few_tokens(name: str, kind: str) -> None:
    _check(name, kind, (1, 3, 8))


@pytest.mark.slow
@pytest.mark.parametrize("hopper", [False, True], ids=["any", "hopper"])
@pytest.mark.parametrize("kind", ["int8-g128", "int4-g32-m", "int4-g32-z", "fp8-e4m3"])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_products_of_many_tokens(name: str, kind: str, hopper: bool) -> None:
    _check(name, kind, (9, 140), hopper=hopper)
