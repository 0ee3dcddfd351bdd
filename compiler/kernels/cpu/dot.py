"""The dot-product micro kernel that the dense, expert and attention kernels share.

``rows`` are weights (or cached keys) in their stored type, contiguous in the summed dimension; ``columns`` are
activations in float32. A block of R rows by C columns keeps its sums in vector registers, so that each loaded
vector is used R or C times.

Two regimes, chosen at run time by the number of columns. Few columns: memory is the limit, and is asked for rows well
ahead. Many columns: arithmetic is the limit, and a block of several rows keeps the multipliers busy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.numeric import widen
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
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

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.compiler.kernels.cpu.machine import Machine

ACCUMULATORS = 8
"""Vector sums wanted at least, to hide the latency of the multiply-add."""
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
    numbers: Sequence[Expr] = ()
    """Of the same vectors where they are ``Rounded``."""


def dot(
    rows: Rows, columns: Columns, depth: int, machine: Machine, *, ahead: Sequence[int] = ()
) -> list[list[Expr]]:
    """Emit ``sum_k rows[r, k] * columns[c, k]``; returns the scalars as ``[r][c]``.

    Memory is asked for so many cache lines before each row is read (``ahead``).
    """
    lanes = min(machine.lanes, _floor_power_of_two(depth))
    R, C = len(rows.offsets), len(columns.offsets)
    copies = max(1, min(ACCUMULATORS // (R * C), depth // lanes))
    sums = [registers(copies * C * lanes) for _ in range(R)]
    for row_sums in sums:
        fill(row_sums, copies * C * lanes, lanes)
    line = CACHE_LINE_BYTES // ELEMENT_BYTES[rows.dtype]
    whole = depth // (lanes * copies) * copies
    with loop(whole // copies) as step:
        for copy in range(copies):
            k = step * i64(copies * lanes) + i64(copy * lanes)
            if copy * lanes % line == 0:
                for lines, offset in product(ahead, rows.offsets):
                    prefetch(rows.buffer, offset + k + i64(lines * line))
            _multiply(rows, columns, k, sums, copy * C, lanes, machine)
    for vector in range(whole, depth // lanes):
        _multiply(rows, columns, i64(vector * lanes), sums, (vector - whole) * C, lanes, machine)
    return _finish(rows, columns, depth, sums, lanes, copies, machine)


def _multiply(
    rows: Rows, columns: Columns, k: Expr, sums: Sequence[Buffer], cell: int, lanes: int, machine: Machine
) -> None:
    """One vector step, added to the sums of each row from number ``cell`` on."""
    x = [keep(load(columns.buffer, offset + k, lanes)) for offset in columns.offsets]
    for offset, row in zip(rows.offsets, sums, strict=True):
        w = keep(widen(rows.buffer, rows.dtype, offset + k, lanes, native_f16=machine.native_f16))
        for number, value in enumerate(x, cell):
            store(row, number * lanes, load(row, number * lanes, lanes) + w * value, lanes)


def _finish(
    rows: Rows,
    columns: Columns,
    depth: int,
    sums: Sequence[Buffer],
    lanes: int,
    copies: int,
    machine: Machine,
) -> list[list[Expr]]:
    """Add the copies and the lanes of each sum, and the elements that fill no vector."""
    C = len(columns.offsets)
    totals = []
    for row in sums:
        vectors = [[load(row, (copy * C + c) * lanes, lanes) for copy in range(copies)] for c in range(C)]
        totals.append([add_lanes(add_vectors(copied), lanes) for copied in vectors])
    tail = depth % lanes
    if tail:
        scalars = [registers(C) for _ in totals]
        for row, values in zip(scalars, totals, strict=True):
            for c, value in enumerate(values):
                store(row, c, value)
        with loop(tail) as step:
            _multiply(rows, columns, step + i64(depth - tail), scalars, 0, 1, machine)
        totals = [[keep(load(row, c)) for c in range(C)] for row in scalars]
    return totals


def add_vectors(values: list[Expr]) -> Expr:
    """The sum of vectors, in pairs."""
    while len(values) > 1:
        pairs = [a + b for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]


def add_lanes(vector: Expr, lanes: int) -> Expr:
    """The sum of a vector's lanes, halving it at each step."""
    return fold_lanes(vector, lanes, lambda low, high: low + high)


def max_lanes(vector: Expr, lanes: int) -> Expr:
    """The largest of a vector's lanes."""
    return fold_lanes(vector, lanes, T.max)


def filled_up(buffer: Buffer, start: Expr, count: int, size: int, lanes: int) -> list[Expr]:
    """``size`` elements in vectors: ``count`` of a buffer from ``start`` on, then zeros."""
    padded = registers(size)
    fill(padded, size, lanes)
    with loop(count) as number:
        store(padded, number, load(buffer, start + number))
    return [keep(load(padded, place, lanes)) for place in range(0, size, lanes)]


def fold_lanes(vector: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """A vector's lanes combined in pairs, halving it at each step."""
    value = keep(vector)
    while lanes > 2:
        lanes //= 2
        dtype = f"float32x{lanes}"
        value = keep(combine(T.vectorlow(dtype, value), T.vectorhigh(dtype, value)))
    return value if lanes == 1 else keep(combine(lane(value, 0), lane(value, 1)))


def _floor_power_of_two(value: int) -> int:
    return 1 << (value.bit_length() - 1)
