"""The packed weights that a lane has in registers: banks of rounds, each of ``unroll`` steps of its rows."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.stream import WORDS
from moec.compiler.kernels.cuda.packed.codes import Zero, widening
from moec.compiler.kernels.cuda.primitives import call, element, i32, registers
from moec.compiler.kernels.emit import load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.few.lanes import Lane
    from moec.compiler.kernels.cuda.packed.operands import PackedStream
    from moec.compiler.kernels.emit import Expr


class LoadedCodes:
    """Codes, scales and zero points of this lane, and their loads.

    Args:
        stream: the weights of the block.
        lane: this thread.
        shared: whether the four lanes of a row take the scale of their step, also those beyond the last column.
    """

    def __init__(self, stream: PackedStream, lane: Lane, *, shared: bool) -> None:
        self.shared = shared
        self.stream, self.lane, self.row, self.tiling = stream, lane, stream.row, stream.tiling
        tiling, row = self.tiling, self.row
        assert tiling.step == row.step
        self.rounds = tiling.rounds(row.columns)
        self.exact = self.rounds * tiling.round_columns == row.layout.padded
        self.lines = [(item, half) for item in range(tiling.streams) for half in range(2)]
        shared_by = max(1, row.kind.group // row.step)
        self.shared_by = shared_by if tiling.unroll % shared_by == 0 else 1
        steps = tiling.banks * tiling.unroll * len(self.lines)
        self.codes = registers(WORDS * steps, "uint32")
        self.scales = registers(steps // self.shared_by, "uint32")
        self.widening = widening(row.kind)
        self.masks = self.widening.held_masks()
        self.zeros = registers(steps // self.shared_by, "uint32") if row.kind.offset_bytes else None
        """Zero points, or minima."""

    def load(self, bank: int, tile: Expr, round_: Expr) -> None:
        """Load a round of codes into a bank, and the scales of their groups."""
        row = self.row
        if self.stream.begin is not None:
            with nullcontext() if self.rounds == 1 else when(round_ == i32(0)):
                self.stream.begin(tile)
        first = self.lane.column(self.tiling, round_)
        starts = [T.bind(self.stream.locate(tile, item, half)) for item, half in self.lines]
        codes = [T.bind(row.codes_at(start, first)) for start in starts]
        for slot in range(self.tiling.unroll):
            column = T.bind(first + i32(row.step * slot))
            valid = tirx.IntImm("bool", 1) if self.exact else T.bind(column < i32(row.layout.padded))
            for line, (start, code) in enumerate(zip(starts, codes, strict=True)):
                target = element(self.codes, WORDS * self._line(bank, slot, line))
                place = code + T.int64(row.step * row.kind.bits // 8 * slot)
                if self.exact:
                    call("stream_16", target, place)
                else:
                    call("stream_16_if", target, place, valid)
                if slot % self.shared_by == 0:
                    own = self._scale(bank, slot, line)
                    group = self._group(column, valid)
                    store(self.scales, own, row.scale_bits(start, *group))
                    if row.kind.zero_points:
                        store(self.zeros, own, row.zero_bits(start, *group))
                    elif row.kind.minima:
                        store(self.zeros, own, row.minimum_bits(start, *group))

    def _group(self, column: Expr, valid: Expr) -> tuple[Expr, Expr]:
        """The column whose group this lane takes the scale of, and whether there is one."""
        if self.exact or not self.shared:
            return column, valid
        first = T.bind(column - self.lane.part * i32(self.row.unit))
        return first, T.bind(first < i32(self.row.layout.padded))

    def hold(self, bank: int, slot: int) -> None:
        """Keep the compiler from widening a step's codes ahead: held wide they would take all registers."""
        for line in range(len(self.lines)):
            call("hold_words", element(self.codes, WORDS * self._line(bank, slot, line)))

    def left(self, bank: int, slot: int, stream: int, word: int) -> list[list[Expr]]:
        """The left operands of the products of a word of 16 or 32 columns: four words of two float16 each."""
        lines = 2 * stream, 2 * stream + 1
        low, high = (
            self.widening.emit(
                T.bind(load(self.codes, WORDS * self._line(bank, slot, line) + word)),
                self._zero(bank, slot, line),
                self.masks,
            )
            for line in lines
        )
        return [[low[pair], high[pair], low[pair + 1], high[pair + 1]] for pair in range(0, len(low), 2)]

    def scale(self, bank: int, slot: int, line: int) -> Expr:
        """What the sums of this lane's row meet."""
        return self.row.scale(load(self.scales, self._scale(bank, slot, line)))

    def minimum(self, bank: int, slot: int, line: int) -> Expr:
        """What the sum of a unit's activations meets, where groups have minima."""
        return self.row.minimum(load(self.zeros, self._scale(bank, slot, line)))

    def _zero(self, bank: int, slot: int, line: int) -> Zero:
        if not self.row.kind.zero_points:
            return Zero.of(self.row.kind)
        return Zero.at(load(self.zeros, self._scale(bank, slot, line)))

    def _line(self, bank: int, slot: int, line: int) -> int:
        """The number of a step's row of this lane."""
        return (bank * self.tiling.unroll + slot) * len(self.lines) + line

    def _scale(self, bank: int, slot: int, line: int) -> int:
        """The number of its scale: steps that follow each other may share one."""
        steps = self.tiling.unroll // self.shared_by
        return (bank * steps + slot // self.shared_by) * len(self.lines) + line
