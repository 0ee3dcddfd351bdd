"""The CPU kernels on quantized weights, against the formats' own reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moec.compiler.kernels import reference
from moec.compiler.kernels.cpu.linear import linear
from moec.compiler.kernels.cpu.machine import Machine
from moec.compiler.kernels.cpu.packed_codes import CODES, SCALE_STORAGE, SCALES
from moec.compiler.kernels.cpu.short_codes import SHORT_CODES, steps_of
from moec.compiler.kernels.cpu.tiling import STREAM_COLUMNS
from moec.formats import FORMATS, Quantized, dequantize, pack_rows
from moec.formats.record import CODE_BITS, SCALE_BYTES
from tests.support.formats import random_quantized
from tests.support.rounded import rounded

Compile = Callable[[Any, int], Callable[..., None]]
Guard = Callable[[torch.Tensor], torch.Tensor]
TOLERANCE = 2e-6
SHORT_TOLERANCE = 3e-4
"""Of a result, relative to the largest: what activations of 16 bits cost. Those of 8 cost a hundred times as much."""
TINY = 1e-28
"""Numbers whose unit is the least: a few dozen of it."""
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
    """Aligned as kernels want it, which numpy's memory is only by chance."""
    return torch.from_numpy(pack_rows(FORMATS[name], quantized)).clone()


def test_there_is_an_emitter_for_everything_a_format_can_have() -> None:
    assert CODES.keys() == CODE_BITS.keys() >= SHORT_CODES.keys()
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
        exact = x.double().numpy()
        seen = rounded(exact, kind.group) if rounds(name, lanes) else exact
        for activations, tolerance in ((seen, TOLERANCE), (exact, SHORT_TOLERANCE)):
            expected = reference.linear(activations, values, bias.double().numpy())
            assert relative(out, expected) < tolerance, tokens
        coarse = reference.linear(rounded(exact, kind.group, 8), values, bias.double().numpy())
        assert relative(out, coarse) > 3 * SHORT_TOLERANCE


def rounds(name: str, lanes: int) -> bool:
    """Whether vectors are rounded for products with a format."""
    return steps_of(FORMATS[name], Machine(lanes)) is not None


def relative(found: torch.Tensor, expected: NDArray[np.float64]) -> float:
    return float(np.abs(found.double().numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "lanes"),
    [("int4-g32", 16), *(pytest.param("int8-g32", n, marks=pytest.mark.slow) for n in (8, 16))],
)
def test_a_vector_of_few_is_multiplied_by_itself(compiled: Compile, name: str, lanes: int) -> None:
    """Whatever is beside it: numbers of other magnitudes, infinity, NaN; and with any threads, a row is one's own."""
    rows, columns = 50, 352
    kernel = compiled(
        linear(rows=rows, columns=columns, dtype=name, batch=None, bias=False, lanes=lanes), lanes
    )
    kind = FORMATS[name]
    quantized = random_quantized(kind, rows, columns, 3)
    weight = packed(quantized, name)
    x = torch.randn(STREAM_COLUMNS, columns, generator=torch.Generator().manual_seed(1))
    x *= torch.tensor([1.0, 1e30, TINY, 1.0, 0.0, 1e-42])[:, None]
    x[3, 40], x[1, 7] = torch.inf, torch.nan
    alone = torch.cat([_product(kernel, x[token : token + 1], weight, rows) for token in range(len(x))])
    for tokens in range(2, STREAM_COLUMNS + 1):
        found = _product(kernel, x[:tokens], weight, rows)
        np.testing.assert_array_equal(found.numpy(), alone[:tokens].numpy())
    assert alone[[1, 3]].isnan().all()
    assert alone[[0, 2, 4, 5]].isfinite().all()
    assert (alone[4:] == 0).all()
    values = dequantize(kind, quantized).astype(np.float64)
    tiny = reference.linear(rounded(x[2:3].double().numpy(), kind.group), values)
    assert relative(alone[2:3], tiny) < TOLERANCE


def _product(kernel: Callable[..., None], x: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor:
    out = torch.full((len(x), rows), 7.0)
    kernel(x, weight, out)
    return out


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
