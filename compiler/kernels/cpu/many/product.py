"""The inner product: copied rows times one or two tiles, over a span of columns, with all sums in registers.

Each pair of codes that is read meets one or two vectors of tokens. A group's sum is exact; it is made float32 and
multiplied by the scales of both once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.short_codes import SHORT_CODES, add_products
from moec.compiler.kernels.emit import Expr, div, fill, i64, keep, load, loop, registers, splat, store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.compiler.kernels.cpu.many.block import Block, Span
    from moec.compiler.kernels.cpu.many.tiles import Tiles


def product(
    block: Block, tiles: Tiles, numbers: Sequence[Expr], lanes: int, span: Span, first: Expr, rows: int
) -> list[list[Expr]]:
    """Emit the products of ``rows`` copied rows from number ``first`` with tiles ``numbers``, over a span.

    Returns:
        The sums ``[row][tile]``: vectors of the first ``lanes`` tokens of each tile.
    """
    return _Product(block, tiles, numbers, lanes, span, first, rows).emit()


class _Product:
    """One product while it is emitted."""

    def __init__(
        self,
        block: Block,
        tiles: Tiles,
        numbers: Sequence[Expr],
        lanes: int,
        span: Span,
        first: Expr,
        rows: int,
    ) -> None:
        self.block, self.tiles, self.numbers, self.lanes = block, tiles, numbers, lanes
        self.depth, self.kind, self.span, self.first = block.depth, block.depth.kind, span, first
        self.R, self.C = rows, len(numbers)
        self.size = rows * self.C * lanes
        self.totals, self.sums = registers(self.size), registers(self.size, "int32")
        self.begins = [keep((first + i64(row)) * i64(block.stride)) for row in range(rows)]

    def emit(self) -> list[list[Expr]]:
        group = self.kind.group
        fill(self.totals, self.size, self.lanes)
        whole = self.span.columns // group
        with loop(whole) as number:
            self._group(number, group)
        rest = self.span.columns - whole * group
        if rest:
            self._group(i64(whole), rest)
        return [
            [load(self.totals, self._cell(row, c), self.lanes) for c in range(self.C)]
            for row in range(self.R)
        ]

    def _cell(self, row: int, c: int) -> int:
        return (row * self.C + c) * self.lanes

    def _group(self, number: Expr, columns: int) -> None:
        """A group's products; ``number`` counts from the span's first."""
        lanes, stride = self.lanes, self.depth.machine.lanes
        for place in range(0, self.size, lanes):
            store(self.sums, place, T.Broadcast(T.int32(0), lanes), lanes)
        begin = keep(number * i64(self.kind.group // 2))
        halves, first = self.depth.padded // 2, div(self.span.first, 2)
        starts = [keep((tile * i64(halves) + first + begin) * i64(stride)) for tile in self.numbers]
        shorts = f"int16x{2 * lanes}"
        with loop(columns // 2) as pair:
            x = [
                keep(T.reinterpret(shorts, load(self.tiles.pairs, start + pair * i64(stride), lanes)))
                for start in starts
            ]
            for row, start in enumerate(self.begins):
                w = T.Broadcast(load(self.block.copies, start + begin + pair), lanes)
                w = keep(T.reinterpret(shorts, w))
                for c, vector in enumerate(x):
                    cell = self._cell(row, c)
                    value = load(self.sums, cell, lanes) + add_products(w, vector, lanes)
                    store(self.sums, cell, value, lanes)
        self._scale(keep(div(self.span.first, self.kind.group) + number))

    def _scale(self, group: Expr) -> None:
        """A group's sums times both scales, and what its minima add."""
        lanes, stride, groups = self.lanes, self.depth.machine.lanes, self.depth.groups
        opened = self.block.opened
        slots = [keep((tile * i64(groups) + group) * i64(stride)) for tile in self.numbers]
        x = [keep(load(self.tiles.scales, slot, lanes)) for slot in slots]
        sums = [] if self.tiles.sums is None else [keep(load(self.tiles.sums, slot, lanes)) for slot in slots]
        unit = SHORT_CODES[self.kind.codes].unit
        for row in range(self.R):
            place = keep((self.first + i64(row)) * i64(groups) + group)
            scale = load(opened.scales, place)
            scale = keep(splat(scale if unit == 1 else scale * T.float32(unit), lanes))
            minimum = None if opened.minima is None else keep(splat(load(opened.minima, place), lanes))
            for c in range(self.C):
                cell = self._cell(row, c)
                added = T.cast(load(self.sums, cell, lanes), f"float32x{lanes}") * x[c] * scale
                if minimum is not None:
                    added = added + minimum * sums[c]
                store(self.totals, cell, load(self.totals, cell, lanes) + added, lanes)
