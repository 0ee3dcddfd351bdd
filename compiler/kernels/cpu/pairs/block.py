"""The inner product: a few rows as they lie times a few vectors, over a span of columns, with all sums in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.numeric import widen
from moec.compiler.kernels.cpu.pair_products import LANES, STEP, add_pairs
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    fill,
    i64,
    keep,
    load,
    loop,
    prefetch,
    registers,
    splat,
    store,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

ROWS = COLUMNS = 4
"""Of a block at most: as many sums as a vector has lanes."""


@dataclass(frozen=True)
class Starts:
    """Numbers in bfloat16, contiguous each: elements of a flat buffer (uint16) where they begin."""

    buffer: Buffer
    starts: Sequence[Expr]


def block(rows: Starts, vectors: Starts, columns: int, ahead: Expr, row_columns: int) -> Expr:
    """Emit ``sum_k rows[r, k] * vectors[c, k]`` of up to ``ROWS`` by ``COLUMNS``, over so many columns.

    Args:
        rows: of the weight.
        vectors: activations.
        columns: of both.
        ahead: where rows begin that memory is asked for meanwhile.
        row_columns: from one of those to the next.

    Returns:
        A vector: the sum of row r and vector c is in lane ``ROWS * c + r``.
    """
    R, C = len(rows.starts), len(vectors.starts)
    sums = [registers(C * LANES) for _ in range(R)]
    for row in sums:
        fill(row, C * LANES, LANES)
    with loop(columns // STEP) as step:
        k = keep(step * i64(STEP))
        for row in range(ROWS):
            prefetch(rows.buffer, ahead + i64(row * row_columns) + k)
        x = [_pairs(vectors.buffer, start + k) for start in vectors.starts]
        for r, start in enumerate(rows.starts):
            w = _pairs(rows.buffer, start + k)
            for c, vector in enumerate(x):
                total = add_pairs(load(sums[r], c * LANES, LANES), w, vector)
                store(sums[r], c * LANES, total, LANES)
    nothing = splat(0.0, LANES)
    cells = [
        load(sums[r], c * LANES, LANES) if r < R and c < C else nothing
        for c in range(COLUMNS)
        for r in range(ROWS)
    ]
    totals = lane_sums(cells)
    tail = columns % STEP
    return _with_tail(totals, rows, vectors, columns - tail, tail) if tail else totals


def _pairs(buffer: Buffer, place: Expr) -> Expr:
    return keep(T.reinterpret(f"int32x{LANES}", load(buffer, place, STEP)))


def _with_tail(totals: Expr, rows: Starts, vectors: Starts, first: int, columns: int) -> Expr:
    """The last columns, which fill no vector, one by one."""
    sums = registers(LANES)
    store(sums, 0, totals, LANES)
    with loop(columns) as step:
        k = keep(step + i64(first))
        w, x = (
            [keep(widen(lines.buffer, "bfloat16", start + k, 1, native_f16=True)) for start in lines.starts]
            for lines in (rows, vectors)
        )
        for c, value in enumerate(x):
            for r, weight in enumerate(w):
                cell = c * ROWS + r
                store(sums, cell, load(sums, cell) + weight * value)
    return keep(load(sums, 0, LANES))


def lane_sums(vectors: Sequence[Expr]) -> Expr:
    """Of ``LANES`` vectors, each one's sum in the lane of its number."""
    bits = LANES.bit_length() - 1
    order = [int(f"{number:0{bits}b}"[::-1], 2) for number in range(LANES)]
    parts = [vectors[number] for number in order]
    width = LANES // 2
    while width:
        parts = [_folded(a, b, width) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        width //= 2
    return parts[0]


def _folded(a: Expr, b: Expr, width: int) -> Expr:
    """Of every ``2 * width`` lanes, both halves of a's added up in the first half, of b's in the second."""
    halves = []
    for half in (0, width):
        lanes = [
            source + first + half + lane
            for first in range(0, LANES, 2 * width)
            for source in (0, LANES)
            for lane in range(width)
        ]
        halves.append(tirx.Shuffle([a, b], [tirx.IntImm("int32", lane) for lane in lanes]))
    return keep(halves[0] + halves[1])
