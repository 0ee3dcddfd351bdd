"""Products on tensor cores, in the emulator: every tile, ragged sizes, batches, epilogues.

The operands are what the kernel gets, already rounded, so that only the order of float32 sums is between it and the
reference: a few parts in 10 million of the largest sum.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tvm.script.ir_builder import tirx

from moec.compiler.kernels import reference
from moec.compiler.kernels.cuda.many import pipeline
from moec.compiler.kernels.cuda.many.gemm import (
    Operand,
    Part,
    Product,
    Result,
    emit_parts,
    store_float32,
    store_pair,
)
from moec.compiler.kernels.cuda.many.gemm_tiles import HOPPER, LARGE, SMALL
from moec.compiler.kernels.cuda.many.tiles import Tile
from moec.compiler.kernels.cuda.many.warpgroup_sums import WarpgroupTile
from moec.compiler.kernels.cuda.many.work_launch import BlockTile
from moec.compiler.kernels.emit import Argument, arguments, build, i64, load, symbol
from moec.compiler.kernels.linear_shape import padded
from tests.support.arrays import DTYPES, aligned, plain, relative_error
from tests.support.cuda_emulator import Emulated
from tests.support.products import Linear

TOLERANCE = 2e-6
TOKENS = (1, 9, 17, 130)
MANY = TOKENS[1:]
"""Too many for the kernels of few tokens."""
TILES: dict[str, BlockTile] = {
    "small": SMALL,
    "large": LARGE,
    "wide": Tile(128, 256, 32, 2, 4, 4),
    "low": Tile(16, 64, 64, 1, 4, 4),
    "Hopper square": WarpgroupTile(rows=128, columns=128, groups=2, stages=3),
    **{f"Hopper {timed.tile.rows}x{timed.tile.columns}": timed.tile for timed in HOPPER},
}


def product(tile: BlockTile, dtype: str, rows: int, depth: int) -> Any:
    def body() -> None:
        tokens = symbol("T")
        a, w, out = arguments(
            Argument("a", (tokens, padded(depth)), dtype),
            Argument("w", (rows, depth), dtype),
            Argument("out", (tokens, rows), "float32"),
        )
        shape = Product(tokens, rows, depth, dtype)
        left, right = Operand(a, padded(depth)), Operand(w, depth)
        emit_parts(left, (Part(shape, right, store_float32(Operand(out, rows))),), tile)

    return build("product", body)


@pytest.mark.parametrize(
    ("tile", "dtype", "rows", "depth"),
    [
        ("small", "bfloat16", 72, 64),
        ("small", "float16", 33, 45),
        ("large", "bfloat16", 200, 200),
        ("large", "float16", 128, 256),
        ("wide", "float16", 300, 96),
        ("wide", "bfloat16", 7, 3),
        ("low", "bfloat16", 72, 328),
        ("Hopper square", "bfloat16", 130, 200),
        ("Hopper 128x128", "float16", 7, 8),
        ("Hopper 128x192", "bfloat16", 200, 448),
        ("Hopper 128x256", "bfloat16", 300, 200),
        ("Hopper 128x256", "float16", 7, 64),
        ("Hopper 256x128", "float16", 130, 328),
    ],
)
def test_a_product_is_that_of_its_operands(tile: str, dtype: str, rows: int, depth: int) -> None:
    kernel = Emulated(product(TILES[tile], dtype, rows, depth))
    generator = torch.Generator().manual_seed(rows)
    for tokens in TOKENS:
        a = torch.zeros(tokens, padded(depth))
        a[:, :depth] = torch.randn(tokens, depth, generator=generator)
        a, w = a.to(DTYPES[dtype]), torch.randn(rows, depth, generator=generator).to(DTYPES[dtype])
        out = aligned(torch.full((tokens, rows), float("nan")))
        kernel("product", aligned(a), aligned(w), out)
        expected = reference.linear(a[:, :depth].double().numpy(), w.double().numpy(), None)
        assert relative_error(plain(out), expected) < TOLERANCE, tokens


@pytest.mark.parametrize("tile", ["Hopper 128x128", "Hopper 256x128"])
def test_blocks_that_stay_take_piece_after_piece(tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MULTIPROCESSORS", 2)
    rows, tokens, depth = 520, 300, 136
    kernel = Emulated(product(TILES[tile], "bfloat16", rows, depth))
    generator = torch.Generator().manual_seed(3)
    a, w = (torch.randn(n, depth, generator=generator).bfloat16() for n in (tokens, rows))
    out = aligned(torch.full((tokens, rows), float("nan")))
    kernel("product", aligned(a), aligned(w), out)
    expected = reference.linear(a.double().numpy(), w.double().numpy(), None)
    assert relative_error(plain(out), expected) < TOLERANCE


@pytest.mark.parametrize("hopper", [False, True], ids=["any GPU", "Hopper"])
@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "batch", "bias"),
    [
        ("bfloat16", 516, 128, None, True),
        ("float16", 200, 64, 3, False),
        ("bfloat16", 33, 45, 2, True),
    ],
)
def test_linear_rounds_its_input_and_adds_the_bias(
    dtype: str, rows: int, columns: int, batch: int | None, bias: bool, hopper: bool
) -> None:
    kernel = Linear(rows, columns, dtype, batch, bias, hopper=hopper)
    lead = () if batch is None else (batch,)
    generator = torch.Generator().manual_seed(columns)
    for tokens in MANY:
        x = torch.randn(*lead, tokens, columns, generator=generator)
        w = torch.randn(*lead, rows, columns, generator=generator).to(DTYPES[dtype])
        offset = torch.randn(*lead, rows, generator=generator)
        out = aligned(torch.full((*lead, tokens, rows), float("nan")))
        kernel(aligned(x), aligned(w), aligned(offset) if bias else None, out)
        seen = x.to(DTYPES[dtype]).double().numpy()
        expected = reference.linear(seen, w.double().numpy(), offset.double().numpy() if bias else None)
        assert relative_error(plain(out), expected) < TOLERANCE, tokens


@pytest.mark.parametrize("hopper", [False, True], ids=["any GPU", "Hopper"])
@pytest.mark.parametrize(("dtype", "columns", "most"), [("bfloat16", 192, 2e-5), ("float16", 45, 1e-6)])
def test_the_input_of_a_product_as_narrow_as_a_router_is_not_rounded(
    dtype: str, columns: int, most: float, hopper: bool
) -> None:
    kernel = Linear(64, columns, dtype, None, True, hopper=hopper)
    generator = torch.Generator().manual_seed(columns)
    for tokens in MANY:
        x = torch.randn(tokens, columns, generator=generator)
        w = torch.randn(64, columns, generator=generator).to(DTYPES[dtype])
        offset = torch.randn(64, generator=generator)
        out = aligned(torch.full((tokens, 64), float("nan")))
        kernel(aligned(x), aligned(w), aligned(offset), out)
        expected = reference.linear(x.double().numpy(), w.double().numpy(), offset.double().numpy())
        assert relative_error(plain(out), expected) < most, tokens


@pytest.mark.parametrize("tile", ["small", "Hopper 128x192"])
def test_several_weights_of_one_input_are_one_launch(tile: str) -> None:
    sizes, depth = (70, 200, 3), 72

    def body() -> None:
        tokens = symbol("T")
        a, *rest = arguments(
            Argument("a", (tokens, depth), "bfloat16"),
            *(Argument("w", (rows, depth), "bfloat16") for rows in sizes),
            *(Argument("out", (tokens, rows), "float32") for rows in sizes),
        )
        parts = [
            Part(
                Product(tokens, rows, depth, "bfloat16"),
                Operand(w, depth),
                store_float32(Operand(out, rows)),
            )
            for rows, w, out in zip(sizes, rest[:3], rest[3:], strict=True)
        ]
        emit_parts(Operand(a, depth), parts, TILES[tile])

    kernel = Emulated(build("several", body))
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(140, depth, generator=generator).bfloat16()
    weights = [torch.randn(rows, depth, generator=generator).bfloat16() for rows in sizes]
    outs = [aligned(torch.full((140, rows), float("nan"))) for rows in sizes]
    kernel("several", aligned(a), *map(aligned, weights), *outs)
    for w, out in zip(weights, outs, strict=True):
        assert relative_error(plain(out), (a.double() @ w.double().T).numpy()) < TOLERANCE


def test_an_epilogue_may_add_a_residual_and_lay_out_its_results_otherwise() -> None:
    rows, depth = 48, 64

    def body() -> None:
        tokens = symbol("T")
        a, w, residual, out = arguments(
            Argument("a", (tokens, 2, depth), "bfloat16"),
            Argument("w", (2, rows, depth), "bfloat16"),
            Argument("residual", (tokens, 2, rows), "float32"),
            Argument("out", (tokens, 2, rows), "float32"),
        )

        def add(result: Result) -> None:
            start = result.row * i64(2 * rows) + result.batch * i64(rows)
            place = tirx.bind(start + result.column)
            values = [value + load(residual, place + i64(k)) for k, value in enumerate(result.values)]
            store_pair(out, place, tuple(values))

        shape = Product(tokens, rows, depth, "bfloat16", 2)
        part = Part(shape, Operand(w, depth, rows * depth), add)
        emit_parts(Operand(a, 2 * depth, depth), (part,), SMALL)

    kernel = Emulated(build("added", body))
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(70, 2, depth, generator=generator).bfloat16()
    w = torch.randn(2, rows, depth, generator=generator).bfloat16()
    residual = torch.randn(70, 2, rows, generator=generator)
    out = aligned(torch.full((70, 2, rows), float("nan")))
    kernel("added", aligned(a), aligned(w), aligned(residual), out)
    expected = torch.einsum("tbk,bnk->tbn", a.double(), w.double()) + residual.double()
    assert relative_error(plain(out), expected) < TOLERANCE


def test_large_products_take_the_large_tile_and_small_ones_the_small(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Linear(72, 96, "bfloat16", bias=True)
    grids: list[int] = []

    def launcher(_name: str, facts: dict[str, Any]) -> Any:
        tags = [tag for tag in facts["launch_param_tags"] if not tag.startswith("tirx.use_prog")]
        place = tags.index("blockIdx.x") - len(tags)
        return lambda *values: grids.append(int(values[place]))

    monkeypatch.setattr(kernel.kernel, "_launcher", launcher)
    w, offset = torch.zeros(72, 96).bfloat16(), torch.zeros(72)
    for tokens, tile in ((64, SMALL), (20_000, LARGE)):
        kernel(*map(aligned, (torch.zeros(tokens, 96), w, offset, torch.zeros(tokens, 72))))
        assert grids[-1] == -(-tokens // tile.rows) * -(-72 // tile.columns)
