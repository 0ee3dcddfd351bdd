"""``out[t, n] = epilogue(sum_k a[t, k] * w[n, k])`` on tensor cores, for many tokens: one launch.

Both operands are 16-bit, sums are float32. What becomes of a sum is an epilogue's business: biases, residuals,
activations and other layouts of the result fuse into the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.emit import either, i64, load, store, when
from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.cuda.tiles import CHUNK, Rows, Tile, TileProduct, clamp

if TYPE_CHECKING:
    from moec.compiler.kernels.cpu.emit import Buffer, Expr

LARGE = Tile(rows=128, columns=128, depth=64, warps_down=2, warps_across=2, stages=3)
"""Two blocks on a multiprocessor of an A100 or H100, one on smaller ones."""
SMALL = Tile(rows=64, columns=64, depth=64, warps_down=2, warps_across=2, stages=4)
"""For few rows, which are there to fill the machine and to stream the weights."""
FILLED_BLOCKS = 128
"""Blocks of the large tile that fill a GPU well enough: fewer, and the small tile is quicker."""
SWATH = 8
"""Tiles of rows that take their turns at the same weights, so that the second-level cache serves them."""


@dataclass(frozen=True)
class Operand:
    """A matrix, or one for each of a batch: element (b, r, k) is at ``start + b*batch + r*row + k``."""

    buffer: Buffer
    row: int | Expr
    """Elements from one row to the next; a multiple of 8 where rows are 16-byte aligned."""
    batch: int | Expr = 0
    start: int | Expr = 0


@dataclass(frozen=True)
class Product:
    """The sizes of ``out [batch, T, N]``, K of the sum, and the 16-bit type of both operands."""

    tokens: Expr
    """T, int64, at least 1."""
    rows: int
    """N, rows of the weight."""
    depth: int
    """K."""
    dtype: str
    batch: int = 1


@dataclass(frozen=True)
class Result:
    """Sums of one row for one column or two neighbouring ones, to be stored by an epilogue."""

    batch: Expr
    row: Expr
    column: Expr
    """All int64."""
    values: tuple[Expr, ...]
    """One or two float32, of ``column`` and ``column + 1``; always two, at an even column, where N is even."""


Epilogue = Callable[[Result], None]


def padded(depth: int) -> int:
    """Elements of a row of rounded activations: K up to a multiple of 8; those beyond K are zeros."""
    return -(-depth // CHUNK) * CHUNK


def emit_product(product: Product, a: Operand, weight: Operand, epilogue: Epilogue) -> None:
    """Emit the product with a tile that suits T: a branch on the host, one launch in each arm."""
    across = -(-product.rows // LARGE.columns) * product.batch
    few_rows = LARGE.rows * max(1, FILLED_BLOCKS // across) - LARGE.rows // 2
    either(
        product.tokens <= i64(few_rows),
        lambda: emit_gemm(product, a, weight, epilogue, SMALL),
        lambda: emit_gemm(product, a, weight, epilogue, LARGE),
    )


def emit_gemm(product: Product, a: Operand, weight: Operand, epilogue: Epilogue, tile: Tile = LARGE) -> None:
    """Emit one launch.

    Args:
        product: sizes.
        a: ``[T, K]`` for each of the batch, 16-bit, rows 16-byte aligned; where K is no multiple of 8 the elements up
            to the next one are zeros.
        weight: ``[N, K]`` for each of the batch, 16-bit, which no launch of the same step writes: it is read before the
            launches ahead of this one are done. Where K is no multiple of 8 reading is slow.
        epilogue: emits what stores a result; runs for every row below T and every column below N.
        tile: of a block.
    """
    down = T.bind(tirx.truncdiv(product.tokens + i64(tile.rows - 1), i64(tile.rows)))
    across = -(-product.rows // tile.columns)
    with cuda.launch((down * i64(across), product.batch), tile.threads) as ((block, batch), thread):
        row_tile, column_tile = _order(block, i32(down), across)
        first_row = T.bind(row_tile * i32(tile.rows))
        first_column = T.bind(column_tile * i32(tile.columns))
        rows_left = T.bind(i32(product.tokens) - first_row)
        work = TileProduct(tile, product.dtype, thread)
        left = _rows(a, padded(product.depth), batch, first_row, rows_left)
        right = _rows(weight, product.depth, batch, first_column, i32(product.rows) - first_column)
        sums = work.multiply(left, right, cuda.wait_previous)
        cuda.launch_next()
        for result in work.results():
            with when(result.row < rows_left):
                row = T.bind(i64(first_row + result.row))
                for column, place in result.columns:
                    values = load(sums, place), load(sums, place + 1)
                    whole = Result(i64(batch), row, i64(first_column + column), values)
                    _store(product, tile, whole, epilogue)


def _order(block: Expr, down: Expr, across: int) -> tuple[Expr, Expr]:
    """Numbers of a block's tile: ``SWATH`` tiles down, then the next column of tiles; then the next swath."""
    swath = T.bind(tirx.truncdiv(block, i32(SWATH * across)))
    inside = T.bind(tirx.truncmod(block, i32(SWATH * across)))
    height = T.bind(T.min(down - swath * i32(SWATH), i32(SWATH)))
    row = T.bind(swath * i32(SWATH) + tirx.truncmod(inside, height))
    return row, T.bind(tirx.truncdiv(inside, height))


def _rows(operand: Operand, depth: int, batch: Expr, first: Expr, left: Expr) -> Rows:
    """The rows of a tile that begins at ``first``, with ``left`` rows from there to the end of the matrix."""
    start = i64(operand.start) + i64(batch) * i64(operand.batch) + i64(first) * i64(operand.row)
    unit = CHUNK if depth % CHUNK == 0 else 1
    stride = i32(operand.row // unit) if isinstance(operand.row, int) else i32(operand.row) // i32(unit)
    return Rows(operand.buffer, T.bind(start), lambda row: clamp(row, left) * stride, unit, depth)


def _store(product: Product, tile: Tile, result: Result, epilogue: Epilogue) -> None:
    inside = result.column < i64(product.rows)
    if product.rows % tile.columns == 0:
        epilogue(result)
    elif product.rows % 2 == 0:
        with when(inside):
            epilogue(result)
    else:
        for number, value in enumerate(result.values):
            column = result.column + i64(number)
            with when(column < i64(product.rows)):
                epilogue(Result(result.batch, result.row, column, (value,)))


def store_float32(out: Operand, bias: Buffer | None = None, bias_batch: int = 0) -> Epilogue:
    """The epilogue that stores float32 sums, plus ``bias[batch * bias_batch + column]`` where there is one."""

    def epilogue(result: Result) -> None:
        values = result.values
        if bias is not None:
            place = T.bind(result.batch * i64(bias_batch) + result.column)
            values = tuple(value + load(bias, place + i64(k)) for k, value in enumerate(values))
        start = i64(out.start) + result.batch * i64(out.batch) + result.row * i64(out.row)
        store_pair(out.buffer, T.bind(start + result.column), values)

    return epilogue


def store_pair(buffer: Buffer, place: Expr, values: tuple[Expr, ...]) -> None:
    """Store one float32, or two at an even place at once."""
    if len(values) == 2:
        cuda.call("store_pair", cuda.element(buffer, place), *values)
    else:
        store(buffer, place, values[0])
