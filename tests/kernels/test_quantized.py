"""The CPU kernels on quantized weights, against the formats' own reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.kernels import reference
from moec.compiler.kernels.cpu.linear import linear
from moec.compiler.kernels.cpu.packed_codes import CODES, SCALE_STORAGE, SCALES
from moec.formats import FORMATS, Quantized, dequantize, pack_rows
from moec.formats.record import CODE_BITS, SCALE_BYTES
from tests.support.formats import random_quantized

Compile = Callable[[Any, int], Callable[..., None]]
Guard = Callable[[torch.Tensor], torch.Tensor]
TOLERANCE = 2e-6
QUICK = (("int4-g32", 16), ("int4-g32-m", 8), ("int8-g128", 4), ("mxfp4", 8), ("fp8-e4m3", 16))
"""What ``make test`` runs: each kind of codes and each width of vectors."""


def every_format() -> list[Any]:
    """Names and lanes; most for ``make test-slow``."""
    return [
        (name, lanes) if (name, lanes) in QUICK else pytest.param(name, lanes, marks=pytest.mark.slow)
        for name in FORMATS
        for lanes in (16, 8, 4)
    ]


def packed(quantized: Quantized, name: str) -> torch.Tensor:
    return torch.from_numpy(pack_rows(FORMATS[name], quantized))


def test_there_is_an_emitter_for_everything_a_format_can_have() -> None:
    assert CODES.keys() == CODE_BITS.keys()
    assert SCALES.keys() == SCALE_STORAGE.keys() == SCALE_BYTES.keys()


@pytest.mark.parametrize(("name", "lanes"), every_format())
def test_products_match_the_reference(compiled: Compile, guarded: Guard, name: str, lanes: int) -> None:
    # Rows that fill no vector, and end within a block and within a group.
    rows, columns = 13, 429
    kind = FORMATS[name]
    kernel = compiled(
        linear(rows=rows, columns=columns, dtype=name, batch=None, bias=True, lanes=lanes), lanes
    )
    quantized = random_quantized(kind, rows, columns, lanes)
    weight, values = guarded(packed(quantized, name)), dequantize(kind, quantized).astype(np.float64)
    generator = torch.Generator().manual_seed(lanes)
    for tokens in (1, 2, 7, 33):
        x = guarded(torch.randn(tokens, columns, generator=generator))
        bias = guarded(torch.randn(rows, generator=generator))
        out = guarded(torch.full((tokens, rows), 7.0))
        kernel(x, weight, bias, out)
        expected = reference.linear(x.double().numpy(), values, bias.double().numpy())
        error = np.abs(out.double().numpy() - expected).max() / np.abs(expected).max()
        assert error < TOLERANCE, tokens


@pytest.mark.parametrize(("name", "lanes"), every_format())
def test_every_code_is_read_exactly(compiled: Compile, name: str, lanes: int) -> None:
    """With one column of ones a product is a weight, whether its row is streamed or copied first."""
    kind = FORMATS[name]
    rows, columns = 256, 2 * kind.group
    kernel = compiled(
        linear(rows=rows, columns=columns, dtype=name, batch=None, bias=False, lanes=lanes), lanes
    )
    quantized = with_special_values(random_quantized(kind, rows, columns, 5), name)
    values = dequantize(kind, quantized)
    weight = packed(quantized, name)
    finite = np.isfinite(values).all(1)
    for column in (0, 17, 31, columns - 1):
        for tokens in (1, 8):
            x, out = torch.zeros(tokens, columns), torch.zeros(tokens, rows)
            x[:, column] = 1.0
            kernel(x, weight, out)
            assert np.isnan(out.numpy()[:, ~finite]).all()
            for row in out.numpy():
                np.testing.assert_array_equal(row[finite], values[finite, column])


def with_special_values(quantized: Quantized, name: str) -> Quantized:
    """Every code in every column, the least and the largest scale, and what is no number."""
    kind, codes, scales = FORMATS[name], quantized.codes, quantized.scales
    wanted = np.arange(len(codes)) % (1 << kind.bits)
    codes[:] = (np.clip(wanted - 128, -127, 127) if kind.codes == "int8" else wanted)[:, None]
    if kind.scale == "float16":
        scales[2:4] = np.array([[6e-8], [65504.0]], np.float16)
    elif kind.scale == "e8m0":
        scales[2:5] = np.array([[0], [250], [255]], np.uint8)
    return quantized
