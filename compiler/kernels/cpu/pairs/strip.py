"""Some rows of one or several matrices times a strip of vectors: what a thread does at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.pair_products import STEP
from moec.compiler.kernels.cpu.pairs.block import COLUMNS, ROWS, Starts, block
from moec.compiler.kernels.emit import Buffer, Expr, div, i64, keep, load, loop, scope, scratch, store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.compiler.kernels.cpu.pairs.vectors import Vectors

SPAN = 2048
"""Columns that are gone over at a time, about: the vectors' part then stays in the second-level cache."""
WIDTHS = (COLUMNS, 2, 1)
"""Vectors of a tile: the first width as often as it fits, then the next; but two vectors make two tiles at least.

Each tile asks for the rows that follow, since some requests are dropped (measured: 57 ms with one tile, 45 with two).
"""


@dataclass(frozen=True)
class Strips:
    """Rows of matrices of one shape, and what is added to each one's results."""

    buffer: Buffer
    """uint16, flat."""
    begins: Sequence[Expr]
    """Where the rows of each matrix begin."""
    rows: int
    """Of each matrix, one after the other."""
    columns: int
    following: Expr
    """What is read after them, likely: memory is asked for it."""
    bias: Callable[[int, Expr], Expr | None]
    """Takes a matrix's number and a row's among those here."""


@dataclass(frozen=True)
class Results:
    """Where the results of a vector go: ``rows`` float32 for each matrix."""

    buffer: Buffer
    start: Callable[[int, Expr], Expr]
    """Takes a matrix's number and the vector's place in the strip."""


@dataclass(frozen=True)
class _Span:
    first: Expr
    columns: int
    next: Expr
    """Where the span begins that comes after it: in the last one, the first of the row."""


class Strip:
    """Emits the products of ``count`` vectors, of which ``number(place)`` is one's number among ``vectors``."""

    def __init__(
        self,
        strips: Strips,
        vectors: Vectors,
        number: Callable[[Expr], Expr],
        count: Expr,
        results: Results,
    ) -> None:
        self.strips, self.vectors, self.number, self.count = strips, vectors, number, count
        self.results = results

    def emit(self) -> None:
        """Everything, in a scope of its own."""
        with scope():
            self._open()
            self._spans()

    def _open(self) -> None:
        """Where each vector and its results begin, once; results begin with their biases."""
        matrices = len(self.strips.begins)
        self.starts = scratch(self.count, "int64")
        self.targets = scratch(self.count * i64(matrices), "int64")
        with loop(self.count) as place:
            store(self.starts, place, self.vectors.start(self.number(place)))
            for matrix in range(matrices):
                target = keep(self.results.start(matrix, place))
                store(self.targets, place * i64(matrices) + i64(matrix), target)
                with loop(self.strips.rows) as row:
                    shift = self.strips.bias(matrix, row)
                    store(self.results.buffer, target + row, T.float32(0) if shift is None else shift)

    def _spans(self) -> None:
        columns = self.strips.columns
        count = max(1, round(columns / SPAN))
        size = -(-columns // (count * STEP)) * STEP
        whole = columns // size
        with loop(whole) as number:
            first = keep(number * i64(size))
            after = first + i64(size)
            self._span(_Span(first, size, keep(T.Select(after < i64(columns), after, i64(0)))))
        if columns % size:
            self._span(_Span(i64(whole * size), columns % size, i64(0)))

    def _span(self, span: _Span) -> None:
        strips = self.strips
        whole, rest = divmod(strips.rows, ROWS)
        begins = [*strips.begins[1:], None]
        for matrix, (begin, following) in enumerate(zip(strips.begins, begins, strict=True)):
            if following is None:
                again = strips.begins[0] + span.next
                after = keep(T.Select(span.next > i64(0), again, strips.following))
            else:
                after = keep(following + span.first)
            place = keep(begin + span.first)
            last = whole if rest else whole - 1
            with loop(whole) as number:
                first = keep(place + number * i64(ROWS * strips.columns))
                ahead = keep(T.Select(number < i64(last), first + i64(ROWS * strips.columns), after))
                self._tiles(matrix, first, number * i64(ROWS), ROWS, ahead, span)
            if rest:
                first = keep(place + i64(whole * ROWS * strips.columns))
                self._tiles(matrix, first, i64(whole * ROWS), rest, after, span)

    def _tiles(self, matrix: int, first: Expr, row: Expr, rows: int, ahead: Expr, span: _Span) -> None:
        """A block of rows meets all vectors."""
        done = i64(0)
        for width in WIDTHS:
            left = keep(self.count - done)
            number = keep(T.Select(self.count > i64(width), div(left, width), i64(0))) if width > 1 else left
            start = done
            with loop(number) as tile:
                place = keep(start + tile * i64(width))
                self._tile(matrix, first, row, rows, ahead, place, width, span)
            done = keep(start + number * i64(width))

    def _tile(
        self,
        matrix: int,
        first: Expr,
        row: Expr,
        rows: int,
        ahead: Expr,
        place: Expr,
        width: int,
        span: _Span,
    ) -> None:
        strips, matrices = self.strips, len(self.strips.begins)
        places = [keep(place + i64(c)) for c in range(width)]
        lines = Starts(strips.buffer, [keep(first + i64(r * strips.columns)) for r in range(rows)])
        starts = [keep(load(self.starts, c) + span.first) for c in places]
        sums = block(lines, Starts(self.vectors.buffer, starts), span.columns, ahead, strips.columns)
        for c, number in enumerate(places):
            target = keep(load(self.targets, number * i64(matrices) + i64(matrix)) + row)
            lanes = [tirx.IntImm("int32", c * ROWS + r) for r in range(rows)]
            value = tirx.Shuffle([sums], lanes)
            store(self.results.buffer, target, load(self.results.buffer, target, rows) + value, rows)
