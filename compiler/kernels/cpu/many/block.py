"""A few rows of weights, copied so that each number can be broadcast, times tiles of tokens.

A row's codes become integers of 16 bits, in pairs. So many columns are copied at a time as the first-level cache holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.dot import CACHE_LINE_BYTES
from moec.compiler.kernels.cpu.packed import Packed, PackedBytes, RowPlace
from moec.compiler.kernels.cpu.packed_codes import SCALE_STORAGE
from moec.compiler.kernels.cpu.short_codes import SHORT_CODES, usual_zero
from moec.compiler.kernels.emit import Expr, div, i64, keep, load, loop, prefetch, scratch, store
from moec.formats.rows import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cpu.many.tiles import Depth
    from moec.compiler.kernels.cpu.packed import PackedRows
    from moec.compiler.kernels.cpu.weights import View

ROWS = 12
"""Of a block: with one tile their sums leave four registers of sixteen."""
SPAN = 512
"""Columns that are copied at a time: a multiple of every group."""
APART = 16
"""Numbers between rows, so that those of one column lie in different sets of the first-level cache."""
HALF_LANES = 8
"""Bytes that hold two codes each are widened 16 at a time: a block's columns then come in order."""


@dataclass(frozen=True)
class Span:
    """Columns ``first .. first + columns - 1``; ``first`` is a multiple of ``SPAN``."""

    first: Expr
    columns: int


def spans(depth: Depth, emit: Callable[[Span], None]) -> None:
    """Call ``emit`` for the columns of a row, one after the other."""
    whole = depth.columns // SPAN
    with loop(whole) as number:
        emit(Span(keep(number * i64(SPAN)), SPAN))
    rest = depth.padded - whole * SPAN
    if rest:
        emit(Span(i64(whole * SPAN), rest))


class Block:
    """Emits the copies of ``rows`` rows.

    Args:
        depth: of the rows, and their format.
        rows: that are copied at a time.
        view: of the memory where they lie.
    """

    def __init__(self, depth: Depth, rows: int, view: View) -> None:
        self.depth, self.rows = depth, rows
        memory = PackedBytes(view("uint8"), view(SCALE_STORAGE[depth.kind.scale]))
        self.packed = Packed(depth.kind, depth.columns, memory, depth.machine, rows)
        self.stride = min(SPAN, depth.padded) // 2 + APART
        self.copies = scratch(rows * self.stride, "int32")
        self._opened: PackedRows | None = None

    def open(self, first: Expr) -> None:
        """Take the rows from number ``first`` on."""
        places = [RowPlace(0, keep(first + i64(row))) for row in range(self.rows)]
        self._opened = self.packed.open(places, ahead=())

    @property
    def opened(self) -> PackedRows:
        """What the groups of these rows have."""
        assert self._opened is not None
        return self._opened

    def copy(self, span: Span) -> None:
        """Copy columns of the rows: codes less their zero, as int16."""
        with loop(self.rows) as row:
            self._widen(row, span)

    def _widen(self, row: Expr, span: Span) -> None:
        """Copy columns of a row; memory is asked for those of the row that comes in its place."""
        depth, kind = self.depth, self.depth.kind
        codes, memory = SHORT_CODES[kind.codes], self.packed.memory.codes
        lanes = HALF_LANES if codes.per_byte == 2 else depth.machine.lanes
        size, row_bytes = kind.bits * BLOCK // 8, depth.layout.row_bytes
        start = keep(self.opened.codes[0] + row * i64(row_bytes) + div(span.first, BLOCK) * i64(size))
        copy = keep(row * i64(self.stride))
        for line in range(0, span.columns // BLOCK * size, CACHE_LINE_BYTES):
            prefetch(memory, start + i64(self.rows * row_bytes + line))

        def block(number: Expr, zero: Expr | None) -> None:
            place = keep(start + number * i64(size))
            for part in range(0, size, 2 * lanes):
                for half, code in enumerate(codes.vectors(memory, place + i64(part), lanes)):
                    value = code if zero is None else code - T.Broadcast(zero, 2 * lanes)
                    target = copy + number * i64(BLOCK // 2) + i64(part // 2 + half * lanes)
                    store(self.copies, target, T.reinterpret(f"int32x{lanes}", value), lanes)

        zeros = self.opened.zeros
        if zeros is None:
            usual = usual_zero(kind)
            with loop(span.columns // BLOCK) as number:
                block(number, tirx.IntImm("int16", usual) if usual else None)
            return

        def group(number: Expr, blocks: int) -> None:
            place = div(span.first, kind.group) + number + row * i64(depth.groups)
            zero = keep(T.cast(load(zeros, place), "int16"))
            for step in range(blocks):
                block(keep(number * i64(kind.group // BLOCK) + i64(step)), zero)

        whole = span.columns // kind.group
        with loop(whole) as number:
            group(number, kind.group // BLOCK)
        rest = span.columns - whole * kind.group
        if rest:
            group(i64(whole), rest // BLOCK)
