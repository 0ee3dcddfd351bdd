"""Rows of quantized weights (``moec.formats.rows``) in vectors: their sum of products, and their values.

A group's products are added up with the codes' own values, in float32, and multiplied by the group's scale once:
what is left of the arithmetic is that of the dequantized weights, but for the order of rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from moec.compiler.kernels.cpu.dot import (
    ACCUMULATORS,
    CACHE_LINE_BYTES,
    Columns,
    add_lanes,
    add_vectors,
    filled_up,
)
from moec.compiler.kernels.cpu.packed_codes import CODES, SCALES, as_float
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
    scratch,
    splat,
    store,
)
from moec.formats.record import SCALE_BYTES
from moec.formats.rows import BLOCK, row_layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.compiler.kernels.cpu.machine import Machine
    from moec.formats.record import Format
    from moec.formats.rows import RowLayout

STEP_COLUMNS = 128
"""Columns of one turn of the loop over a row, at least."""


@dataclass(frozen=True)
class PackedBytes:
    """Where packed rows lie, by the type that is read: the same memory."""

    codes: Buffer
    """uint8; zero points too."""
    scales: Buffer
    """Minima too, which are of the same type."""


@dataclass(frozen=True)
class RowPlace:
    """Where a row lies: its number in a matrix that begins at byte ``begin``."""

    begin: int
    number: Expr

    def element(self, row_bytes: int, offset: int = 0, size: int = 1) -> Expr:
        """The number of the element of ``size`` bytes at byte ``offset`` of the row."""
        return self.number * i64(row_bytes // size) + i64((self.begin + offset) // size)


def prefetch_groups(memory: PackedBytes, layout: RowLayout, place: RowPlace, ahead: Sequence[int]) -> None:
    """Ask for what a row has after its codes, so many cache lines before (``ahead``)."""
    first = keep(place.element(layout.row_bytes, layout.scales_offset))
    for line in range(0, layout.row_bytes - layout.scales_offset, CACHE_LINE_BYTES):
        for lines in ahead:
            prefetch(memory.codes, first + i64(line + lines * CACHE_LINE_BYTES))


@dataclass(frozen=True)
class PackedRows:
    """Rows that were opened: where their codes begin, and what their groups have, as float32."""

    codes: list[Expr]
    scales: Buffer
    """``[rows, G]``."""
    zeros: Buffer | None
    minima: Buffer | None


class Packed:
    """Emits what is done with packed rows of one length.

    Args:
        kind: their format.
        depth: columns.
        memory: their bytes.
        machine: the processor.
        most_rows: that are open at a time; their scales lie in the workspace of the scope where this is made.
    """

    def __init__(
        self, kind: Format, depth: int, memory: PackedBytes, machine: Machine, most_rows: int
    ) -> None:
        self.kind, self.depth, self.memory, self.machine = kind, depth, memory, machine
        self.layout = row_layout(kind, depth)
        self._scales = scratch(most_rows * self.layout.groups)
        self._zeros = scratch(most_rows * self.layout.groups) if kind.zero_points else None
        self._minima = scratch(most_rows * self.layout.groups) if kind.minima else None

    def open(self, places: Sequence[RowPlace], *, ahead: Sequence[int]) -> PackedRows:
        """Read what the groups of rows have; memory is asked for so many cache lines before (``ahead``)."""
        groups, lanes = self.layout.groups, self.machine.lanes
        for row, place in enumerate(places):
            prefetch_groups(self.memory, self.layout, place, ahead)
            self._widen_scales(row, place, 0, groups // lanes, lanes)
            self._widen_scales(row, place, groups // lanes * lanes, groups % lanes, 1)
        return PackedRows(
            [keep(place.element(self.layout.row_bytes)) for place in places],
            self._scales,
            self._zeros,
            self._minima,
        )

    def _widen_scales(self, row: int, place: RowPlace, first: int, vectors: int, lanes: int) -> None:
        """``vectors`` vectors of a row's scales, zero points and minima, from number ``first`` on."""
        layout, size = self.layout, SCALE_BYTES[self.kind.scale]
        unit = CODES[self.kind.codes].unit
        scales = keep(place.element(layout.row_bytes, layout.scales_offset, size))
        zeros = keep(place.element(layout.row_bytes, layout.zeros_offset, self.kind.offset_bytes or 1))
        with loop(vectors) as step:
            number = keep(step * i64(lanes) + i64(first))
            target = keep(number + i64(row * layout.groups))
            scale = SCALES[self.kind.scale](self.memory.scales, scales + number, lanes, self.machine)
            store(self._scales, target, scale if unit == 1 else scale * splat(1 / unit, lanes), lanes)
            if self._zeros is not None:
                zero = load(self.memory.codes, zeros + number, lanes)
                store(self._zeros, target, as_float(zero, lanes), lanes)
            if self._minima is not None:
                minimum = SCALES["float16"](self.memory.scales, zeros + number, lanes, self.machine)
                store(self._minima, target, minimum, lanes)

    def dot(self, rows: PackedRows, columns: Columns, *, ahead: Sequence[int]) -> list[list[Expr]]:
        """Emit ``sum_k rows[r, k] * columns[c, k]``; returns the scalars as ``[r][c]``."""
        return _Dot(self, rows, columns, ahead).emit()

    def unpack(self, rows: PackedRows, target: Buffer, stride: int) -> None:
        """Write the values of whole blocks of the rows to ``target [rows, stride]``."""
        kind = self.kind
        for row in range(len(rows.codes)):

            def write(group: Expr, blocks: int, row: int = row) -> None:
                lanes = self.machine.lanes
                number = group + i64(row * self.layout.groups)
                scale = keep(splat(load(rows.scales, number), lanes))
                minimum = None if rows.minima is None else keep(splat(load(rows.minima, number), lanes))
                for block in range(blocks):
                    first = keep(group * i64(kind.group) + i64(row * stride + block * BLOCK))
                    for vector, value in enumerate(self.block(rows, row, group, block)):
                        scaled = value * scale if minimum is None else value * scale + minimum
                        store(target, first + i64(vector * lanes), scaled, lanes)

            whole = self.depth // kind.group
            with loop(whole) as group:
                write(group, kind.group // BLOCK)
            rest = self.layout.padded - whole * kind.group
            if rest:
                write(i64(whole), rest // BLOCK)

    def block(self, rows: PackedRows, row: int, group: Expr, block: int) -> list[Expr]:
        """The values of a block of a group, before scale and minimum: float32 vectors."""
        zero = splat(0.0, self.machine.lanes) if self.kind.minima else None
        if rows.zeros is not None:
            zero = keep(splat(load(rows.zeros, group + i64(row * self.layout.groups)), self.machine.lanes))
        size = self.kind.bits * BLOCK // 8
        place = keep(rows.codes[row] + group * i64(self.kind.group // BLOCK * size) + i64(block * size))
        return CODES[self.kind.codes].block(self.memory.codes, place, zero, self.machine)


class _Dot:
    """One product while it is emitted."""

    def __init__(self, packed: Packed, rows: PackedRows, columns: Columns, ahead: Sequence[int]) -> None:
        self.packed, self.rows, self.columns, self.ahead = packed, rows, columns, ahead
        self.lanes = packed.machine.lanes
        self.R, self.C = len(rows.codes), len(columns.offsets)
        self.cells = self.R * self.C
        self.copies = max(1, ACCUMULATORS // self.cells)
        self.totals = registers(self.copies * self.cells * self.lanes)
        self.partial = registers(self.cells * self.lanes)
        self.columns_sums = registers(self.C * self.lanes) if rows.minima is not None else None
        """Of a group of every column: what its minimum is multiplied by."""

    def emit(self) -> list[list[Expr]]:
        group, depth = self.packed.kind.group, self.packed.depth
        fill(self.totals, self.copies * self.cells * self.lanes, self.lanes)
        at_once = max(1, STEP_COLUMNS // group)
        whole = depth // group
        steps = whole // at_once
        with loop(steps) as step:
            first = keep(step * i64(at_once))
            self._prefetch(first, at_once)
            for number in range(at_once):
                self._group(keep(first + i64(number)), number % self.copies, group // BLOCK, 0)
        for number in range(steps * at_once, whole):
            self._group(i64(number), number % self.copies, group // BLOCK, 0)
        if depth % group:
            self._group(i64(whole), whole % self.copies, depth % group // BLOCK, depth % BLOCK)
        return self._sums()

    def _prefetch(self, group: Expr, count: int) -> None:
        size = self.packed.kind.group * self.packed.kind.bits // 8
        for line in range(0, count * size, CACHE_LINE_BYTES):
            for lines, codes in product(self.ahead, self.rows.codes):
                place = codes + group * i64(size) + i64(line + lines * CACHE_LINE_BYTES)
                prefetch(self.packed.memory.codes, place)

    def _group(self, group: Expr, copy: int, blocks: int, tail: int) -> None:
        """A group's products: of whole ``blocks``, and of ``tail`` columns after them, the last of the row."""
        lanes = self.lanes
        first = keep(group * i64(self.packed.kind.group))
        for block in range(blocks):
            self._block(group, block, self._vectors(first, block))
        if tail:
            self._block(group, blocks, self._tail(first, blocks, tail))
        for row in range(self.R):
            number = group + i64(row * self.packed.layout.groups)
            scale = keep(splat(load(self.rows.scales, number), lanes))
            minima = self.rows.minima
            minimum = None if minima is None else keep(splat(load(minima, number), lanes))
            for cell in range(row * self.C, (row + 1) * self.C):
                place = (copy * self.cells + cell) * lanes
                added = load(self.partial, cell * lanes, lanes) * scale
                if minimum is not None:
                    added = added + load(self.columns_sums, cell % self.C * lanes, lanes) * minimum
                store(self.totals, place, load(self.totals, place, lanes) + added, lanes)

    def _vectors(self, first: Expr, block: int) -> list[list[Expr]]:
        """A block of every column, as ``[vector][column]``."""
        columns, lanes = self.columns, self.lanes
        return [
            [keep(load(columns.buffer, c + first + i64(block * BLOCK + k), lanes)) for c in columns.offsets]
            for k in range(0, BLOCK, lanes)
        ]

    def _tail(self, first: Expr, block: int, count: int) -> list[list[Expr]]:
        """The last ``count`` elements of every column, filled up with zeros."""
        columns, lanes = self.columns, self.lanes
        starts = (offset + first + i64(block * BLOCK) for offset in columns.offsets)
        tails = [filled_up(columns.buffer, start, count, BLOCK, lanes) for start in starts]
        return [list(vectors) for vectors in zip(*tails, strict=True)]

    def _block(self, group: Expr, block: int, x: list[list[Expr]]) -> None:
        lanes = self.lanes
        if self.columns_sums is not None:
            for c in range(self.C):
                total = add_vectors([vector[c] for vector in x])
                if block:
                    total = load(self.columns_sums, c * lanes, lanes) + total
                store(self.columns_sums, c * lanes, total, lanes)
        for row in range(self.R):
            values = self.packed.block(self.rows, row, group, block)
            for vector, value in enumerate(values):
                w = keep(value)
                for c in range(self.C):
                    place = (row * self.C + c) * lanes
                    product = w * x[vector][c]
                    if block or vector:
                        product = load(self.partial, place, lanes) + product
                    store(self.partial, place, product, lanes)

    def _sums(self) -> list[list[Expr]]:
        sums = []
        for cell in range(self.cells):
            vectors = [
                load(self.totals, (copy * self.cells + cell) * self.lanes, self.lanes)
                for copy in range(self.copies)
            ]
            sums.append(add_lanes(add_vectors(vectors), self.lanes))
        return [sums[row * self.C : (row + 1) * self.C] for row in range(self.R)]
