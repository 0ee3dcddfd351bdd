"""The dot-product micro kernel that the dense, expert and attention kernels share.

``rows`` are weights (or cached keys) in their stored type, contiguous in the summed dimension; ``columns`` are
activations in float32. A block of R rows by C columns keeps its sums in vector registers, so that each loaded
vector is used R or C times.

Two regimes, chosen at run time by the number of columns. Few columns: memory is the limit, and one sequential
stream with several accumulators reads faster than several rows at once (measured: 34 against 26 GB/s on one core).
Many columns: arithmetic is the limit, and a block of several rows keeps the multipliers busy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.emit import (
    Buffer,
    Expr,
    ceildiv,
    div,
    either,
    fill,
    i64,
    keep,
    lane,
    load,
    loop,
    prefetch,
    registers,
    store,
)
from moec.compiler.kernels.cpu.numeric import widen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.compiler.kernels.cpu.machine import Machine

STREAM_COLUMNS = 6
"""Up to this many columns the rows are streamed."""
STREAM_WIDTH = 4
"""Columns of one pass over a streamed row; further passes find it in the first-level cache."""
ACCUMULATORS = 8
"""Vector sums wanted at least, to hide the latency of the multiply-add."""
PREFETCH_LINES = 128
"""How far ahead of a streamed row memory is asked for; it doubles the rate where the activations fill the cache."""
CACHE_LINE_BYTES = 64
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Rows:
    """Rows of a stored matrix: element offsets into a flat buffer."""

    buffer: Buffer
    dtype: str
    offsets: Sequence[Expr]


@dataclass(frozen=True)
class Columns:
    """Float32 vectors: element offsets into a flat buffer."""

    buffer: Buffer
    offsets: Sequence[Expr]


def dot(
    rows: Rows, columns: Columns, depth: int, machine: Machine, *, ahead: int | None = None
) -> list[list[Expr]]:
    """Emit ``sum_k rows[r, k] * columns[c, k]``; returns the scalars as ``[r][c]``.

    Memory is asked for ``ahead`` cache lines before each row is read; by default ``PREFETCH_LINES`` of a single row,
    and not at all of several, which are a block that is used often.
    """
    if ahead is None:
        ahead = PREFETCH_LINES if len(rows.offsets) == 1 else 0
    lanes = min(machine.lanes, _floor_power_of_two(depth))
    cells = len(rows.offsets) * len(columns.offsets)
    copies = max(1, min(ACCUMULATORS // cells, depth // lanes))
    sums = registers(cells * copies * lanes)
    fill(sums, cells * copies * lanes, lanes)
    line = CACHE_LINE_BYTES // ELEMENT_BYTES[rows.dtype]
    whole = depth // (lanes * copies) * copies
    with loop(whole // copies) as step:
        for copy in range(copies):
            k = step * i64(copies * lanes) + i64(copy * lanes)
            if ahead and copy * lanes % line == 0:
                for offset in rows.offsets:
                    prefetch(rows.buffer, offset + k + i64(ahead * line))
            _multiply(rows, columns, k, sums, copy * cells, lanes, machine)
    for vector in range(whole, depth // lanes):
        _multiply(rows, columns, i64(vector * lanes), sums, (vector - whole) * cells, lanes, machine)
    return _finish(rows, columns, depth, sums, lanes, copies, machine)


def _multiply(
    rows: Rows, columns: Columns, k: Expr, sums: Buffer, cell: int, lanes: int, machine: Machine
) -> None:
    """One vector step, added to the sums from number ``cell`` on."""
    x = [keep(load(columns.buffer, offset + k, lanes)) for offset in columns.offsets]
    for offset in rows.offsets:
        w = keep(widen(rows.buffer, rows.dtype, offset + k, lanes, native_f16=machine.native_f16))
        for value in x:
            store(sums, cell * lanes, load(sums, cell * lanes, lanes) + w * value, lanes)
            cell += 1


def _finish(
    rows: Rows, columns: Columns, depth: int, sums: Buffer, lanes: int, copies: int, machine: Machine
) -> list[list[Expr]]:
    """Add the copies and the lanes of each sum, and the elements that fill no vector."""
    R, C = len(rows.offsets), len(columns.offsets)
    cells = R * C
    totals = []
    for cell in range(cells):
        vectors = [load(sums, (copy * cells + cell) * lanes, lanes) for copy in range(copies)]
        totals.append(add_lanes(_tree(vectors), lanes))
    tail = depth % lanes
    if tail:
        scalars = registers(cells)
        for cell, total in enumerate(totals):
            store(scalars, cell, total)
        with loop(tail) as step:
            _multiply(rows, columns, step + i64(depth - tail), scalars, 0, 1, machine)
        totals = [keep(load(scalars, cell)) for cell in range(cells)]
    return [totals[r * C : (r + 1) * C] for r in range(R)]


def _tree(values: list[Expr]) -> Expr:
    while len(values) > 1:
        pairs = [a + b for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]


def add_lanes(vector: Expr, lanes: int) -> Expr:
    """The sum of a vector's lanes, halving it at each step."""
    return _fold(vector, lanes, lambda low, high: low + high)


def max_lanes(vector: Expr, lanes: int) -> Expr:
    """The largest of a vector's lanes."""
    return _fold(vector, lanes, T.max)


def _fold(vector: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    value = keep(vector)
    while lanes > 2:
        lanes //= 2
        dtype = f"float32x{lanes}"
        value = keep(combine(T.vectorlow(dtype, value), T.vectorhigh(dtype, value)))
    return value if lanes == 1 else keep(combine(lane(value, 0), lane(value, 1)))


def _floor_power_of_two(value: int) -> int:
    return 1 << (value.bit_length() - 1)


def tiles(rows: int, columns: Expr, machine: Machine, emit: Callable[[list[Expr], list[Expr]], None]) -> None:
    """Call ``emit(row numbers, column numbers)`` for tiles that cover ``rows`` by ``columns``.

    The last tile of several rows moves up so as to stay inside: its first rows are then computed twice.
    """

    def block() -> None:
        height = min(machine.rows, rows)
        with loop(-(-rows // height)) as tile:
            first = keep(T.min(tile * i64(height), i64(rows - height)))
            numbers = [first + i64(r) for r in range(height)]
            _column_tiles(columns, (machine.columns, 1), lambda inner: emit(numbers, inner))

    either(columns <= i64(STREAM_COLUMNS), lambda: stream(rows, columns, emit), block)


def stream(rows: int | Expr, columns: Expr, emit: Callable[[list[Expr], list[Expr]], None]) -> None:
    """As ``tiles``, each row by itself: for few columns."""
    with loop(rows) as row:
        _column_tiles(columns, (STREAM_WIDTH, 2, 1), lambda numbers: emit([row], numbers))


def stream_halves(rows: Expr, columns: Expr, emit: Callable[[list[Expr], list[Expr]], None]) -> None:
    """As ``stream``, two rows at a time: one of the first half, one of the second; the last may come twice."""
    half = keep(ceildiv(rows, 2))
    with loop(half) as row:
        pair = [row, keep(T.min(row + half, rows - i64(1)))]
        _column_tiles(columns, (STREAM_WIDTH, 2, 1), lambda numbers: emit(pair, numbers))


def _column_tiles(count: Expr, widths: tuple[int, ...], emit: Callable[[list[Expr]], None]) -> None:
    """Tiles of the first width as often as they fit, then of the next."""
    done = i64(0)
    for width in widths:
        start = done
        number = keep(div(count - start, width))
        with loop(number) as tile:
            emit([keep(start + tile * i64(width) + i64(c)) for c in range(width)])
        done = keep(start + number * i64(width))
