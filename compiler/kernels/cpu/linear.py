"""``y[.., t, n] = sum_k x[.., t, k] * w[.., n, k] (+ b[.., n])``: every weight product of the dense segments.

With few tokens the kernel is a stream through the weights, each read once; with many it is blocked so that a
chunk of tokens stays in the second-level cache while the rows of the weight pass by. Weights whose codes are multiplied
as integers then meet tiles of tokens (``many``), those of bfloat16 tokens in bfloat16 where there is an instruction for
that (``pairs``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.dot import Columns
from moec.compiler.kernels.cpu.machine import Machine
from moec.compiler.kernels.cpu.many.cover import tiles_of
from moec.compiler.kernels.cpu.many.gather import gather, scatter
from moec.compiler.kernels.cpu.many.strip import StripRows, strip
from moec.compiler.kernels.cpu.many.tiles import depth_of, new_tiles
from moec.compiler.kernels.cpu.matrix import Lines, Matrix
from moec.compiler.kernels.cpu.packed import RowPlace
from moec.compiler.kernels.cpu.pairs.tokens import EXACT_ROWS, PairTokens
from moec.compiler.kernels.cpu.rounding import round_vectors
from moec.compiler.kernels.cpu.tiling import STREAM_COLUMNS, tiles
from moec.compiler.kernels.cpu.weights import STREAM_ROWS, matrix_argument, memory_of, row_bytes, weights
from moec.compiler.kernels.emit import (
    Argument,
    Expr,
    arguments,
    build,
    ceildiv,
    div,
    either,
    i64,
    keep,
    load,
    loop,
    mod,
    scope,
    scratch,
    store,
    symbol,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tvm import tirx

    from moec.compiler.kernels.cpu.many.tiles import Depth, Tiles
    from moec.compiler.kernels.cpu.pair_products import PairProducts
    from moec.compiler.kernels.cpu.rounding import Rounded
    from moec.compiler.kernels.cpu.tiling import Tile
    from moec.compiler.kernels.cpu.weights import Dots

CHUNK_BYTES = 1 << 18
"""Float32 activations that a thread keeps in its second-level cache."""
TASK_ROWS, MANY_ROWS = 12, 48
"""Rows of the weight that a thread takes at a time: row by row, and for tiles of many tokens."""
TILES_BYTES = 1 << 19
"""Of those tiles that a thread keeps in its second-level cache."""


def linear(
    *,
    rows: int,
    columns: int,
    dtype: str,
    batch: int | None,
    bias: bool,
    lanes: int,
    pairs: PairProducts | None = None,
) -> tirx.PrimFunc:
    """The kernel ``linear(x, weight, [bias], out)`` for weights of one shape.

    Args:
        rows: N, the outputs; any number from 1.
        columns: K, the summed dimension, contiguous in memory; any number from 1.
        dtype: of the weight: ``bfloat16``, ``float16``, ``float32``, or the name of a format (``moec.formats``), which
            is ``uint8 [.., N, row_bytes]``. All else is float32.
        batch: B for ``x [B, T, K]``, ``weight [B, N, K]``, ``bias [B, N]``, ``out [B, T, N]``; ``None`` for
            ``x [T, K]``, ``weight [N, K]``, ``bias [N]``, ``out [T, N]``. T is symbolic.
        bias: whether there is one.
        lanes: float32 lanes of the target's vectors (16, 8 or 4).
        pairs: the target's instruction for pairs of bfloat16, if any.
    """
    lead = () if batch is None else (batch,)

    def body() -> None:
        T_ = symbol("T")
        x, weight, shift, out = arguments(
            Argument("x", (*lead, T_, columns), "float32"),
            matrix_argument("weight", (*lead, rows, columns), dtype),
            Argument("bias", (*lead, rows), "float32") if bias else None,
            Argument("out", (*lead, T_, rows), "float32"),
        )
        matrix = Matrix(weight, dtype, rows, columns, batch or 1, shift)
        emit_linear(
            Machine(lanes, pairs),
            matrix,
            T_,
            Lines(x, lambda number, token: (number * T_ + token) * i64(columns)),
            Lines(out, lambda number, token: (number * T_ + token) * i64(rows)),
        )

    return build("linear", body)


def emit_linear(machine: Machine, matrix: Matrix, tokens: Expr, x: Lines, out: Lines) -> None:
    """Emit the product of all tokens (int64) with a matrix."""
    depth = depth_of(matrix.dtype, matrix.columns, machine)

    def few() -> None:
        with scope():
            _Rows(machine, matrix, tokens, x, out, many=False).emit()

    def by_size(many: Callable[[], None]) -> None:
        either(tokens <= i64(STREAM_COLUMNS), few, many)

    if depth is not None:
        by_size(_ManyTokens(depth, matrix, tokens, x, out).emit)
    elif machine.pairs is not None and matrix.dtype == "bfloat16" and matrix.rows > EXACT_ROWS:
        with machine.pairs.defined():
            by_size(PairTokens(matrix, tokens, x, out, parallel=matrix.parallel).emit)
    else:
        _Rows(machine, matrix, tokens, x, out).emit()


class _Rows:
    """A product that goes row by row of the weight while it is emitted; without ``many`` tokens are always few."""

    def __init__(
        self, machine: Machine, matrix: Matrix, tokens: Expr, x: Lines, out: Lines, *, many: bool = True
    ) -> None:
        self.many, self.matrix = many, matrix
        self.machine, self.tokens, self.x, self.out = machine, tokens, x, out
        self.rows, self.columns, self.batch = matrix.rows, matrix.columns, matrix.batch
        self.weight, self.dtype, self.bias = matrix.weight, matrix.dtype, matrix.bias
        rows, columns = matrix.rows, matrix.columns
        self.block = min(TASK_ROWS, rows)
        self.chunk = max(
            8 * machine.columns, CHUNK_BYTES // (4 * columns) // machine.columns * machine.columns
        )

    def emit(self) -> None:
        blocks = -(-self.rows // self.block)
        chunks = keep(ceildiv(self.tokens, self.chunk))
        streamed = min(STREAM_ROWS, self.block)
        few, rounded = self._round_few()
        with loop(chunks * i64(self.batch * blocks), parallel=self.matrix.parallel) as task, scope():
            row = keep(T.min(mod(task, blocks) * i64(self.block), i64(self.rows - self.block)))
            chunk = keep(mod(div(task, blocks), chunks))
            batch = keep(div(task, chunks * i64(blocks)))
            token = keep(chunk * i64(self.chunk))
            count = keep(T.min(i64(self.chunk), self.tokens - token))
            matrices = weights(
                memory_of(self.weight, self.batch * self.rows * row_bytes(self.dtype, self.columns)),
                self.dtype,
                self.columns,
                self.machine,
                stream_rows=streamed,
                block_rows=min(self.machine.rows, self.block) if self.many else 0,
                rounded=rounded,
            )

            def open_rows(numbers: list[Expr], often: bool) -> Tile:
                rows = [keep(batch * i64(self.rows) + row + number) for number in numbers]
                dots = matrices.open([RowPlace(0, number) for number in rows], often)
                return lambda columns: self._tile(
                    dots,
                    rows,
                    [row + number for number in numbers],
                    batch,
                    [keep(token + c) for c in columns],
                    few,
                )

            tiles(self.block, count, self.machine, open_rows, stream_rows=streamed, many=self.many)

    def _round_few(self) -> tuple[Expr, Rounded | None]:
        """Round the tokens of the last chunk, if they are few; gives the first, too."""
        count = keep(mod(self.tokens, self.chunk))
        first = keep(self.tokens - count)
        if self.batch > 1:
            return first, None
        few = keep(T.Select(count <= i64(STREAM_COLUMNS), count, i64(0)))
        start = self.x.start(i64(0), first)
        return first, round_vectors(self.dtype, self.columns, self.machine, self.x.buffer, few, first=start)

    def _tile(
        self,
        dots: Dots,
        rows: list[Expr],
        within: list[Expr],
        batch: Expr,
        tokens: list[Expr],
        few: Expr,
    ) -> None:
        starts = [keep(self.x.start(batch, token)) for token in tokens]
        sums = dots(Columns(self.x.buffer, starts, [keep(token - few) for token in tokens]))
        for r, number in enumerate(rows):
            shift = None if self.bias is None else keep(load(self.bias, number))
            for c, token in enumerate(tokens):
                value = sums[r][c] if shift is None else sums[r][c] + shift
                store(self.out.buffer, self.out.start(batch, token) + within[r], value)


class _ManyTokens:
    """A product of tiles of tokens while it is emitted."""

    def __init__(self, depth: Depth, matrix: Matrix, tokens: Expr, x: Lines, out: Lines) -> None:
        self.depth, self.matrix, self.tokens, self.x, self.out = depth, matrix, tokens, x, out
        self.lanes = depth.machine.lanes
        self.parallel = matrix.parallel

    def emit(self) -> None:
        count = keep(tiles_of(self.tokens, self.lanes))
        with scope():
            tiles = new_tiles(self.depth, count * i64(self.matrix.batch))
            with loop(count * i64(self.matrix.batch), parallel=self.parallel) as number, scope():
                batch, first = keep(div(number, count)), keep(mod(number, count) * i64(self.lanes))
                last = keep(self.tokens - i64(1))
                tokens = [T.min(first + i64(lane), last) for lane in range(self.lanes)]
                gather(tiles, number, self.x.buffer, [keep(self.x.start(batch, token)) for token in tokens])
            self._products(tiles, count)

    def _products(self, tiles: Tiles, count: Expr) -> None:
        """A few tiles stay in the second-level cache while rows of the weight pass by."""
        matrix, lanes, target = self.matrix, self.lanes, self.out
        height = min(MANY_ROWS, matrix.rows)
        blocks = -(-matrix.rows // height)
        chunk = max(2, TILES_BYTES // (2 * self.depth.padded * lanes))
        chunks = keep(ceildiv(count, chunk))
        size = matrix.batch * matrix.rows * row_bytes(matrix.dtype, matrix.columns)
        with loop(chunks * i64(matrix.batch * blocks), parallel=self.parallel) as task, scope():
            row = keep(T.min(mod(task, blocks) * i64(height), i64(matrix.rows - height)))
            place = keep(mod(div(task, blocks), chunks) * i64(chunk))
            batch = keep(div(task, chunks * i64(blocks)))
            token = keep(place * i64(lanes))
            tokens = keep(T.min(i64(chunk * lanes), self.tokens - token))
            begin = keep(batch * i64(matrix.rows) + row)
            rows = StripRows(memory_of(matrix.weight, size), begin, height, self._bias)
            results = scratch(chunk * height * lanes)
            strip(rows, tiles, keep(batch * count + place), tokens, results, i64(0))

            def start(number: Expr) -> Expr:
                return target.start(batch, token + number) + row

            scatter(results, height, tokens, lanes, target.buffer, start)

    def _bias(self, row: Expr) -> Expr | None:
        return None if self.matrix.bias is None else keep(load(self.matrix.bias, row))
