"""``out[t, n] = epilogue(sum_k a[t, k] * w[n, k])`` on tensor cores, for many tokens: one launch.

Both operands are 16-bit, sums are float32. What becomes of a sum is an epilogue's business: biases, residuals,
activations and other layouts of the result fuse into the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.many.panels import PanelRows
from moec.compiler.kernels.cuda.many.tiles import CHUNK, Rows, clamp
from moec.compiler.kernels.cuda.many.work import Piece, Work
from moec.compiler.kernels.cuda.many.work_launch import BlockTile, emit_work
from moec.compiler.kernels.cuda.packed.rows import LOAD_BYTES, PackedRow
from moec.compiler.kernels.cuda.packed.tiles import PackedRows
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import at_address, i64, load, store, when
from moec.compiler.kernels.linear_shape import padded
from moec.formats import format_of

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.many.tiles import ResultRow
    from moec.compiler.kernels.emit import Buffer, Expr

SWATH_ROWS = 1024
"""Rows whose tiles take their turns at the same weights, so that the second-level cache serves them."""


@dataclass(frozen=True)
class Operand:
    """A matrix, or one for each of a batch: element (b, r, k) is at ``start + b*batch + r*row + k``."""

    buffer: Buffer
    row: int | Expr
    """Elements from one row to the next; a multiple of 8 where rows are 16-byte aligned."""
    batch: int | Expr = 0
    start: int | Expr = 0
    panel_rows: Expr | None = None
    """Of a matrix that is cut into panels (see `panels.PanelRows`, of each term its own), int64."""


@dataclass(frozen=True)
class Product:
    """The sizes of ``out [batch, T, N]``, K of the sum, and the 16-bit type that both operands have or get."""

    tokens: Expr
    """T, int64, at least 1."""
    rows: int
    """N, rows of the weight."""
    depth: int
    """K."""
    dtype: str
    batch: int = 1
    terms: int = 1
    """Numbers that stand for one of a, side by side in its rows: all terms meet the same weights."""
    format: str | None = None
    """Of the weight, where it is quantized."""

    @property
    def packed(self) -> PackedRow | None:
        """The weight's rows, where it is quantized."""
        kind = format_of(self.format)
        return None if kind is None else PackedRow(kind, self.depth)

    @property
    def row(self) -> int:
        """Elements of the weight's buffer from one row to the next: 16-bit numbers, or bytes where it is quantized."""
        return self.packed.layout.row_bytes if self.packed else self.depth


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


@dataclass(frozen=True)
class Part:
    """One of several weights that meet the same left operand."""

    product: Product
    weight: Operand
    """``[N, K]`` for each of the batch, 16-bit or quantized, which no launch of the same step writes: it is read before
    the launches ahead of this one are done. Where K of 16-bit ones is no multiple of 8 reading is slow."""
    epilogue: Epilogue
    """Emits what stores a result; runs for every row below T and every column below N."""


def emit_parts(a: Operand, parts: Sequence[Part], tile: BlockTile) -> None:
    """Emit one launch.

    Args:
        a: ``[T, terms * padded(K)]`` for each of the batch, 16-bit, rows 16-byte aligned; where K is no multiple of 8
            the elements up to the next one are zeros.
        parts: products alike in all but N.
        tile: of a block.
    """
    product = parts[0].product
    across = sum(-(-part.product.rows // tile.columns) for part in parts)
    down = tiles_down(product, tile)

    @contextmanager
    def piece(number: Expr) -> Iterator[Piece]:
        each = i32(down) * i32(across)
        batch, inside = (number // each, number % each) if product.batch > 1 else (i32(0), number)
        batch, (row_tile, column_tile) = T.bind(batch), order(T.bind(inside), down, across, tile)
        first_row = T.bind(row_tile * i32(tile.rows))
        rows_left = T.bind(i32(product.tokens) - first_row)
        chosen = _choose(parts, column_tile, tile.columns)
        left = left_rows(a, product, tile, batch, (first_row, rows_left))
        weight, first_column = chosen.weight, chosen.first_column
        right = _weight_rows(product, weight, batch, first_column, chosen.rows - first_column)

        def keep(sums: Buffer, results: list[ResultRow]) -> None:
            def put(part: Part) -> None:
                for result in results:
                    with when(result.row < rows_left):
                        row = T.bind(i64(first_row + result.row))
                        for column, place in result.columns:
                            values = load(sums, place), load(sums, place + 1)
                            whole = Result(i64(batch), row, i64(first_column + column), values)
                            _store(part.product, tile, whole, part.epilogue)

            chosen.each(put)

        yield Piece(left, right, keep, product.terms)

    work = Work(down * i64(across * product.batch), piece, product.dtype, finds_early=True)
    emit_work(tile, work, packed=product.packed is not None)


def tiles_down(product: Product, tile: BlockTile) -> Expr:
    """Tiles of rows, int64."""
    return T.bind(tirx.truncdiv(product.tokens + i64(tile.rows - 1), i64(tile.rows)))


@dataclass(frozen=True)
class _Chosen:
    """The weight of a block, and where its tile begins in it."""

    weight: Operand
    rows: Expr
    first_column: Expr
    """int32 both."""
    each: Callable[[Callable[[Part], None]], None]
    """Emits something for every part, to be done by the blocks that have it."""


def _choose(parts: Sequence[Part], column_tile: Expr, columns: int) -> _Chosen:
    if len(parts) == 1:
        rows = i32(parts[0].product.rows)
        return _Chosen(parts[0].weight, rows, T.bind(column_tile * i32(columns)), lambda put: put(parts[0]))
    ends = list(accumulate(-(-part.product.rows // columns) for part in parts))
    number, before, rows = i32(len(parts) - 1), i32(ends[-2]), i32(parts[-1].product.rows)
    address = address_of(parts[-1].weight)
    batch = i64(parts[-1].weight.batch)
    for part in reversed(range(len(parts) - 1)):
        inside = column_tile < i32(ends[part])
        number = T.Select(inside, i32(part), number)
        before = T.Select(inside, i32(ends[part - 1] if part else 0), before)
        rows = T.Select(inside, i32(parts[part].product.rows), rows)
        address = T.Select(inside, address_of(parts[part].weight), address)
        batch = T.Select(inside, i64(parts[part].weight.batch), batch)
    number, first = T.bind(number), T.bind((column_tile - before) * i32(columns))
    product = parts[0].product
    most = max(part.product.rows for part in parts) * product.row * product.batch
    buffer = at_address(T.bind(address), most, "uint8" if product.packed else product.dtype)
    weight = Operand(buffer, parts[0].weight.row, T.bind(batch))

    def each(put: Callable[[Part], None]) -> None:
        for part in range(len(parts)):
            with when(number == i32(part)):
                put(parts[part])

    return _Chosen(weight, T.bind(rows), first, each)


def address_of(operand: Operand) -> Expr:
    """Of its first element, int64."""
    return cuda.value("int64", "address", cuda.element(operand.buffer, i64(operand.start)))


def order(number: Expr, down: Expr, across: int, tile: BlockTile) -> tuple[Expr, Expr]:
    """Numbers of a piece's tile: so many tiles down, then the next column of tiles; then the next swath."""
    height = SWATH_ROWS // tile.rows
    swath = T.bind(tirx.truncdiv(number, i32(height * across)))
    inside = T.bind(tirx.truncmod(number, i32(height * across)))
    own = T.bind(T.min(i32(down) - swath * i32(height), i32(height)))
    row = T.bind(swath * i32(height) + tirx.truncmod(inside, own))
    return row, T.bind(tirx.truncdiv(inside, own))


def left_rows(
    a: Operand, product: Product, tile: BlockTile, batch: Expr, rows: tuple[Expr, Expr]
) -> Rows | PanelRows:
    """The rows of ``a`` of a tile: the first, and how many there are from it to the end of the matrix."""
    first, left = rows
    if a.panel_rows is None:
        return rows_of(a, padded(product.depth), batch, first, left)
    assert product.batch == 1
    own = T.bind(T.min(left, i32(tile.rows)))
    return PanelRows(a.buffer, i64(first), a.panel_rows, product.depth, own)


def rows_of(operand: Operand, depth: int, batch: Expr, first: Expr, left: Expr) -> Rows:
    """The rows of a tile that begins at ``first``, with ``left`` rows from there to the end of the matrix."""
    start = i64(operand.start) + i64(batch) * i64(operand.batch) + i64(first) * i64(operand.row)
    unit = CHUNK if depth % CHUNK == 0 else 1
    stride = i32(operand.row // unit) if isinstance(operand.row, int) else i32(operand.row) // i32(unit)
    return Rows(operand.buffer, T.bind(start), lambda row: clamp(row, left) * stride, unit, depth)


def _weight_rows(
    product: Product, weight: Operand, batch: Expr, first: Expr, left: Expr
) -> Rows | PackedRows:
    """The rows of a weight's tile."""
    packed = product.packed
    if packed is None:
        return rows_of(weight, product.depth, batch, first, left)
    start = i64(batch) * i64(weight.batch) + i64(first) * i64(packed.layout.row_bytes)
    units = packed.layout.row_bytes // LOAD_BYTES
    return PackedRows(T.bind(address_of(weight) + start), lambda row: clamp(row, left) * i32(units), packed)


def _store(product: Product, tile: BlockTile, result: Result, epilogue: Epilogue) -> None:
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
