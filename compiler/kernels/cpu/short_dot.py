"""Products of rows of quantized weights with activations of 16 bits (``rounding``).

A group's sum of products is an integer, and exact; it is made float32 and multiplied by the scales of both once. What
zero points and minima add is a product of the groups' own numbers, of which there are few.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.dot import CACHE_LINE_BYTES, Columns, add_lanes, add_vectors
from moec.compiler.kernels.cpu.packed import STEP_COLUMNS, PackedBytes, RowPlace, prefetch_groups
from moec.compiler.kernels.cpu.packed_codes import SCALES, as_float
from moec.compiler.kernels.cpu.rounding import Rounded, group_vectors
from moec.compiler.kernels.cpu.short_codes import SHORT_CODES, add_products, usual_zero
from moec.compiler.kernels.cpu.tiling import STREAM_WIDTH
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    div,
    fill,
    i64,
    keep,
    load,
    loop,
    prefetch,
    registers,
    scratch,
    splat,
    store,
)
from moec.formats.record import SCALE_BYTES
from moec.formats.rows import row_layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.compiler.kernels.cpu.machine import Machine
    from moec.formats.record import Format


class ShortDots:
    """Emits products with packed rows of one length.

    Args:
        kind: their format.
        depth: columns.
        memory: their bytes.
        machine: the processor.
        rounded: the vectors.
        most_rows: of a product; what their groups have lies in the workspace of the scope where this is made.
    """

    def __init__(
        self,
        kind: Format,
        depth: int,
        memory: PackedBytes,
        machine: Machine,
        rounded: Rounded,
        most_rows: int,
    ) -> None:
        self.kind, self.memory, self.machine = kind, memory, machine
        self.steps, self.rounded = rounded.steps, rounded
        self.layout, self.chunks = row_layout(kind, depth), group_vectors(kind, depth, machine)
        self.scales = scratch(most_rows * STREAM_WIDTH * self.layout.groups)

    def dot(self, places: Sequence[RowPlace], columns: Columns, *, ahead: Sequence[int]) -> list[list[Expr]]:
        """Emit ``sum_k rows[r, k] * columns[c, k]``; returns the scalars as ``[r][c]``.

        Memory is asked for so many cache lines before each row is read (``ahead``).
        """
        return _ShortDot(self, places, columns, ahead).emit()


class _ShortDot:
    """One product while it is emitted. A span is a step, or as many as a group has."""

    def __init__(
        self, dots: ShortDots, places: Sequence[RowPlace], columns: Columns, ahead: Sequence[int]
    ) -> None:
        self.dots, self.places, self.ahead = dots, places, ahead
        self.kind, self.layout = dots.kind, dots.layout
        self.steps, self.lanes = dots.steps, dots.steps.lanes
        self.codes = SHORT_CODES[self.kind.codes]
        self.R, self.C = len(places), len(columns.numbers)
        self.cells = self.R * self.C
        self.span = max(self.kind.group, self.steps.columns)
        self.numbers = columns.numbers
        self.values = [keep(number * i64(self.layout.padded)) for number in columns.numbers]
        self.rows = [keep(place.element(self.layout.row_bytes)) for place in places]
        self.totals = registers(self.cells * self.lanes)
        self.offsets = registers(self.cells * dots.chunks.lanes)
        self.sums = registers(self.cells * self.lanes, "int32")

    def emit(self) -> list[list[Expr]]:
        fill(self.totals, self.cells * self.lanes, self.lanes)
        fill(self.offsets, self.cells * self.dots.chunks.lanes, self.dots.chunks.lanes)
        for row in range(self.R):
            self._groups(row)
        spans, at_once = self.layout.padded // self.span, max(1, STEP_COLUMNS // self.span)
        with loop(spans // at_once) as step:
            first = keep(step * i64(at_once))
            self._prefetch(first * i64(self.span), at_once * self.span)
            for number in range(at_once):
                self._span(keep(first + i64(number)))
        for number in range(spans // at_once * at_once, spans):
            self._span(i64(number))
        rest = self.layout.padded - spans * self.span
        halves = self._rest(spans * self.span, rest) if rest else None
        return self._finish(halves)

    def _groups(self, row: int) -> None:
        """The scales of a row's groups, times those of each column's; what zero points or minima add."""
        dots, layout, kind, place = self.dots, self.layout, self.kind, self.places[row]
        lanes, chunks, rounded = dots.chunks.lanes, dots.chunks, dots.rounded
        prefetch_groups(dots.memory, layout, place, self.ahead)
        scales = keep(place.element(layout.row_bytes, layout.scales_offset, SCALE_BYTES[kind.scale]))
        offsets = keep(place.element(layout.row_bytes, layout.zeros_offset, kind.offset_bytes or 1))

        def chunk(first: Expr, summed: Expr) -> None:
            """From group ``first`` on, of whose sums the place is ``summed``."""
            scale = SCALES[kind.scale](dots.memory.scales, scales + first, lanes, dots.machine)
            scale = keep(scale if self.codes.unit == 1 else scale * splat(self.codes.unit, lanes))
            offset = self._offset(scale, offsets + first)
            for c, number in enumerate(self.numbers):
                both = scale * load(rounded.scales, number * i64(layout.groups) + first, lanes)
                cell = row * self.C + c
                store(dots.scales, first + i64(cell * layout.groups), both, lanes)
                if offset is not None:
                    sums = load(rounded.sums, number * i64(layout.groups + chunks.again) + summed, lanes)
                    total = load(self.offsets, cell * lanes, lanes) + offset * sums
                    store(self.offsets, cell * lanes, total, lanes)

        with loop(chunks.whole) as number:
            first = keep(number * i64(lanes))
            chunk(first, first)
        if chunks.again:
            chunk(i64(chunks.groups - lanes), i64(chunks.whole * lanes))

    def _offset(self, scale: Expr, place: Expr) -> Expr | None:
        """What a group's sum of activations is multiplied by."""
        memory, lanes = self.dots.memory, self.dots.chunks.lanes
        if self.kind.minima:
            return keep(SCALES["float16"](memory.scales, place, lanes, self.dots.machine))
        if self.kind.zero_points:
            return keep(splat(0.0, lanes) - scale * as_float(load(memory.codes, place, lanes), lanes))
        zero = usual_zero(self.kind)
        return keep(scale * splat(-float(zero), lanes)) if zero else None

    def _prefetch(self, column: Expr, columns: int) -> None:
        for line in range(0, columns // self.codes.per_byte, CACHE_LINE_BYTES):
            for lines, row in product(self.ahead, self.rows):
                place = row + self._byte(column) + i64(line + lines * CACHE_LINE_BYTES)
                prefetch(self.dots.memory.codes, place)

    def _byte(self, column: Expr) -> Expr:
        return column if self.codes.per_byte == 1 else div(column, self.codes.per_byte)

    def _span(self, span: Expr) -> None:
        """The products of whole groups."""
        groups = self.span // self.kind.group
        first = keep(span * i64(self.span))
        for step in range(0, self.span, self.steps.columns):
            self._step(first + i64(step), self.sums, self.lanes, begin=step == 0)
        for cell in range(self.cells):
            place = span * i64(groups) + i64(cell * self.layout.groups)
            scale = load(self.dots.scales, place, groups)
            self._add(self.totals, self.sums, cell, self._spread(scale, groups), self.lanes)

    def _spread(self, scale: Expr, groups: int) -> Expr:
        """One or two scales, each in its group's lanes."""
        if groups == 1:
            return splat(scale, self.lanes)
        lanes = [tirx.IntImm("int32", number * groups // self.lanes) for number in range(self.lanes)]
        return tirx.Shuffle([scale] * (self.lanes // groups), lanes)

    def _rest(self, first: int, columns: int) -> Buffer | None:
        """What follows the spans: less than a group, or one that is half a step; sums of half the lanes, if any."""
        group = first // self.kind.group
        whole = columns // self.steps.columns * self.steps.columns
        for step in range(0, whole, self.steps.columns):
            self._step(i64(first + step), self.sums, self.lanes, begin=step == 0)
        scales = [
            load(self.dots.scales, i64(group + cell * self.layout.groups)) for cell in range(self.cells)
        ]
        if whole:
            for cell, scale in enumerate(scales):
                self._add(self.totals, self.sums, cell, splat(scale, self.lanes), self.lanes)
        if whole == columns:
            return None
        lanes = self.lanes // 2
        halves, sums = registers(self.cells * lanes), registers(self.cells * lanes, "int32")
        fill(halves, self.cells * lanes, lanes)
        self._step(i64(first + whole), sums, lanes, begin=True)
        for cell, scale in enumerate(scales):
            self._add(halves, sums, cell, splat(scale, lanes), lanes)
        return halves

    def _step(self, column: Expr, sums: Buffer, lanes: int, *, begin: bool) -> None:
        """The products of one step, which begins at ``column``, of all cells."""
        memory = self.dots.memory
        count = 2 * lanes
        codes = [
            [keep(part) for part in self.codes.vectors(memory.codes, keep(row + self._byte(column)), lanes)]
            for row in self.rows
        ]
        for c, value in enumerate(self.values):
            x = [
                keep(load(self.dots.rounded.codes, value + column + i64(part * count), count))
                for part in range(self.codes.per_byte)
            ]
            for r, parts in enumerate(codes):
                place = (r * self.C + c) * lanes
                products = [add_products(part, vector, lanes) for part, vector in zip(parts, x, strict=True)]
                if not begin:
                    products.append(load(sums, place, lanes))
                store(sums, place, add_vectors(products), lanes)

    def _add(self, totals: Buffer, sums: Buffer, cell: int, scale: Expr, lanes: int) -> None:
        place = cell * lanes
        value = T.cast(load(sums, place, lanes), f"float32x{lanes}") * scale
        store(totals, place, load(totals, place, lanes) + value, lanes)

    def _finish(self, halves: Buffer | None) -> list[list[Expr]]:
        results, chunk = [], self.dots.chunks.lanes
        for cell in range(self.cells):
            total = load(self.totals, cell * self.lanes, self.lanes)
            offset = load(self.offsets, cell * chunk, chunk)
            if chunk == self.lanes:
                total = total + offset
            value = add_lanes(total, self.lanes)
            if chunk != self.lanes:
                value = value + add_lanes(offset, chunk)
            if halves is not None:
                half = self.lanes // 2
                value = value + add_lanes(load(halves, cell * half, half), half)
            results.append(value)
        return [results[row * self.C : (row + 1) * self.C] for row in range(self.R)]
