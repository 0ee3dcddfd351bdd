from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T  # noqa: N812

from moec.compiler.kernels import reference
from moec.compiler.kernels.cuda.dense.few import emit_linear_few, read_rows, store_rows
from moec.compiler.kernels.cuda.dense.few_block import FewProduct
from moec.compiler.kernels.cuda.dense.few_group import FewGroup
from moec.compiler.kernels.cuda.few.tiling import STEP_COLUMNS, Tiling, choose_tiling
from moec.compiler.kernels.cuda.few.tokens import Block
from moec.compiler.kernels.cuda.primitives import i32, shared, sync
from moec.compiler.kernels.emit import Argument, arguments, build, i64, load, store, symbol
from moec.runtime.tensors import aligned_empty
from tests.support.cuda_emulator import Emulated
from tests.support.products import Linear

TOLERANCE = {"bfloat16": 8e-6, "float16": 2e-6, "float32": 2e-6}
"""Of a result, relative to the largest: activations have 16 bits of mantissa beside bfloat16, 22 beside float16."""
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def _random(generator: torch.Generator, *shape: int) -> NDArray[np.float32]:
    return _aligned(torch.randn(*shape, generator=generator).numpy())


def _weight(generator: torch.Generator, dtype: str, *shape: int) -> tuple[Any, NDArray[np.float64]]:
    """A weight as a kernel takes it, and as numbers."""
    value = torch.randn(*shape, generator=generator).to(TYPES[dtype])
    if dtype == "bfloat16":
        return (_aligned(value.view(torch.int16).numpy().view(np.uint16)), dtype), value.double().numpy()
    return _aligned(value.numpy()), value.double().numpy()


def _error(got: NDArray[Any], expected: NDArray[np.float64]) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


CASES = [
    ("bfloat16", 37, 136, None, True),
    ("float16", 70, 2088, None, False),
    ("bfloat16", 16, 2048, None, False),
    ("bfloat16", 33, 128, 3, True),
    ("float16", 20, 8, None, True),
    ("bfloat16", 20, 37, None, True),
    ("float16", 9, 70, 2, False),
    ("float32", 37, 72, None, True),
    ("float32", 5, 33, 2, False),
]


@pytest.mark.parametrize(("dtype", "rows", "columns", "batch", "bias"), CASES)
def test_linear_matches_the_reference(
    dtype: str, rows: int, columns: int, batch: int | None, bias: bool
) -> None:
    kernel = Linear(rows, columns, dtype, batch, bias)
    lead = () if batch is None else (batch,)
    generator = torch.Generator().manual_seed(rows)
    stored, weight = _weight(generator, dtype, *lead, rows, columns)
    offset = _random(generator, *lead, rows)
    more = (
        (11,) if dtype == "float32" else ()
    )  # of 16-bit weights tests/kernels/cuda/test_gemm.py has more tokens
    for tokens in (1, 3, 8, *more):
        x = _random(generator, *lead, tokens, columns)
        out = _aligned(np.full((*lead, tokens, rows), 7, np.float32))
        kernel(x, stored, offset if bias else None, out)
        expected = reference.linear(x.astype(float), weight, offset.astype(float) if bias else None)
        assert _error(out, expected) < TOLERANCE[dtype], tokens


ROWS = (40, 7, 64)


def _group(columns: int, tiling: Tiling | None, dtype: str = "bfloat16") -> Emulated:
    """``group(x, w0, w1, w2, y0, y1, y2)``."""

    def body() -> None:
        tokens = symbol("T")
        x, *others = arguments(
            Argument("x", (tokens, columns), "float32"),
            *(Argument(f"w{i}", (rows, columns), dtype) for i, rows in enumerate(ROWS)),
            *(Argument(f"y{i}", (tokens, rows), "float32") for i, rows in enumerate(ROWS)),
        )
        epilogue = store_rows(
            others[3:],
            [None, None, None],
            ROWS,
            lambda i, _, token, row: T.cast(token, "int64") * i64(ROWS[i]) + T.cast(row, "int64"),
        )
        prologue = read_rows(x, lambda token, _: T.cast(token, "int64") * i64(columns))
        group = FewGroup(ROWS, columns, dtype)
        product = FewProduct(group, others[:3], tokens, prologue, epilogue, tiling or group.tiling())
        emit_linear_few(product)

    return Emulated(build("group", body))


TILINGS = [
    None,
    Tiling(1, 2, 1),
    Tiling(2, 1, 3, tiles=2),
    Tiling(1, 3, 2, tiles=3),
    Tiling(2, 2, 2, tiles=2, streams=2),
    Tiling(1, 12, 4),
    Tiling(4, 1, 1, tiles=2),
]


@pytest.mark.parametrize(
    ("columns", "tiling"),
    [(192, None), *((1544, tiling) for tiling in TILINGS)]
    + [pytest.param(192, tiling, marks=pytest.mark.slow) for tiling in TILINGS if tiling is not None],
)
def test_weights_that_share_their_input_are_one_launch(tiling: Tiling | None, columns: int) -> None:
    """However the rows and columns are cut; with the larger tilings not all activations fit at once."""
    kernel = _group(columns, tiling)
    generator = torch.Generator().manual_seed(1)
    stored, weights = zip(*(_weight(generator, "bfloat16", rows, columns) for rows in ROWS), strict=True)
    assert len(kernel._code.functions) == 1
    for tokens in (1, 8):
        x = _random(generator, tokens, columns)
        outs = [_aligned(np.full((tokens, rows), 7, np.float32)) for rows in ROWS]
        kernel("group", x, *stored, *outs)
        for out, weight in zip(outs, weights, strict=True):
            assert _error(out, reference.linear(x.astype(float), weight)) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("columns", [1544, 4104])
def test_a_token_alone_has_the_same_bits_as_among_others(columns: int) -> None:
    kernel = Linear(24, columns, "bfloat16")
    generator = torch.Generator().manual_seed(2)
    stored, _ = _weight(generator, "bfloat16", 24, columns)
    x = _random(generator, 8, columns)
    together = _aligned(np.zeros((8, 24), np.float32))
    kernel(x, stored, None, together)
    for token in range(8):
        alone = _aligned(np.zeros((1, 24), np.float32))
        kernel(_aligned(x[token : token + 1]), stored, None, alone)
        assert np.array_equal(alone[0], together[token])


def test_batch_with_tokens_outside() -> None:
    """``x [T, B, K]`` and ``y [T, B, N]``, as heads lie between two products."""
    batch, rows, columns = 3, 20, 64

    def body() -> None:
        tokens = symbol("T")
        x, weight, out = arguments(
            Argument("x", (tokens, batch, columns), "float32"),
            Argument("w", (batch, rows, columns), "float16"),
            Argument("y", (tokens, batch, rows), "float32"),
        )

        def line(token: Any, number: Any) -> Any:
            return T.cast(token * i32(batch) + number, "int64")

        prologue = read_rows(x, lambda token, number: line(token, number) * i64(columns))
        epilogue = store_rows(
            [out],
            [None],
            (rows,),
            lambda _, number, token, row: line(token, number) * i64(rows) + T.cast(row, "int64"),
        )
        group = FewGroup((rows,), columns, "float16", batch)
        emit_linear_few(FewProduct(group, [weight], tokens, prologue, epilogue, group.tiling()))

    kernel = Emulated(build("heads", body))
    generator = torch.Generator().manual_seed(3)
    stored, weight = _weight(generator, "float16", batch, rows, columns)
    x = _random(generator, 5, batch, columns)
    out = _aligned(np.full((5, batch, rows), 7, np.float32))
    kernel("heads", x, stored, out)
    expected = np.einsum("tbk,bnk->tbn", x.astype(float), weight)
    assert _error(out, expected) < TOLERANCE["float16"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_prologue_may_use_the_whole_block(dtype: str) -> None:
    """Activations that are divided by the sum of their row: once through shared memory, in every block."""
    rows, columns = 40, 72

    def body() -> None:
        tokens = symbol("T")
        x, weight, out = arguments(
            Argument("x", (tokens, columns), "float32"),
            Argument("w", (rows, columns), dtype),
            Argument("y", (tokens, rows), "float32"),
        )
        plain = read_rows(x, lambda token, _: T.cast(token, "int64") * i64(columns))

        def prologue(block: Block) -> Any:
            block.wait()
            sums = shared(8)
            with T.If(block.thread < block.tokens), T.Then():
                store(sums, block.thread, T.float32(0))
                with T.serial(i32(0), i32(columns)) as k:
                    place = T.cast(block.thread * i32(columns) + k, "int64")
                    store(sums, block.thread, load(sums, block.thread) + load(x, place))
            sync()
            read = plain(block)
            return lambda token, column, count: [
                T.bind(item / load(sums, token)) for item in read(token, column, count)
            ]

        epilogue = store_rows(
            [out], [None], (rows,), lambda _, b, t, row: T.cast(t * i32(rows) + row, "int64")
        )
        group = FewGroup((rows,), columns, dtype)
        emit_linear_few(FewProduct(group, [weight], tokens, prologue, epilogue, group.tiling()))

    kernel = Emulated(build("normed", body))
    generator = torch.Generator().manual_seed(4)
    stored, weight = _weight(generator, dtype, rows, columns)
    x = _aligned(np.abs(_random(generator, 6, columns)))
    out = _aligned(np.zeros((6, rows), np.float32))
    kernel("normed", x, stored, out)
    expected = reference.linear(x / x.astype(float).sum(-1, keepdims=True), weight)
    assert _error(out, expected) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [
        ("bfloat16", 1e-20, 8e-6),
        ("bfloat16", 1e20, 8e-6),
        ("float16", 2e-4, 1e-6),
        ("float16", 1.0, 1e-6),
        ("float16", 2e5, 1e-6),
    ],
)
def test_activations_of_any_size_stay_exact(dtype: str, size: float, tolerance: float) -> None:
    kernel = Linear(16, 64, dtype)
    generator = torch.Generator().manual_seed(5)
    stored, weight = _weight(generator, dtype, 16, 64)
    x = _aligned((_random(generator, 2, 64) * size).astype(np.float32))
    out = _aligned(np.zeros((2, 16), np.float32))
    kernel(x, stored, None, out)
    assert _error(out, reference.linear(x.astype(float), weight)) < tolerance


def test_float16_saturates_and_keeps_what_is_no_number() -> None:
    kernel = Linear(1, 8, "float16")
    weight = _aligned(np.array([[1, 0, 0, 0, 0, 0, 0, 0]], np.float16))
    x = _aligned(np.zeros((3, 8), np.float32))
    x[:, 0] = 1e9, -np.inf, np.nan
    out = _aligned(np.zeros((3, 1), np.float32))
    kernel(x, weight, None, out)
    assert 1.0e6 < out[0, 0] < 1.1e6
    assert -1.1e6 < out[1, 0] < -1.0e6
    assert np.isnan(out[2, 0])


def test_values_beyond_the_last_token_column_or_row_do_no_harm() -> None:
    """Weights that are not numbers stay in their rows and columns."""
    kernel = Linear(17, 40, "float16")
    memory = _aligned(np.full(17 * 40 + 512, np.nan, np.float16))
    weight = memory[: 17 * 40].reshape(17, 40)
    weight[...] = 1.0
    x, out = _aligned(np.ones((3, 40), np.float32)), _aligned(np.zeros((3, 17), np.float32))
    kernel(x, weight, None, out)
    assert (out == 40).all()


@pytest.mark.parametrize("columns", [8, 32, 64, 128, 512, 1408, 2048, 2816, 4096, 10944, 14336])
@pytest.mark.parametrize("streams", [1, 2])
def test_tilings_waste_little(columns: int, streams: int) -> None:
    tiling = choose_tiling(2048, columns, streams=streams)
    steps = -(-columns // STEP_COLUMNS)
    done = tiling.rounds(columns) * tiling.column_warps * tiling.unroll
    assert steps <= done <= 1.05 * steps + 1
    assert tiling.threads <= 512
    assert tiling.unroll * streams <= 8


def test_blocks_that_would_come_in_two_waves_take_two_tiles() -> None:
    assert [choose_tiling(rows, 2048).tiles for rows in (4224, 4240, 8448, 8464)] == [1, 2, 2, 1]
