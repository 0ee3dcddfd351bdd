"""Sums of the warps of a block, added up through shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.lanes import quotient, remainder
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS, LANES, TILE_ROWS
from moec.compiler.kernels.cuda.primitives import i32, shared, sync
from moec.compiler.kernels.emit import load, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cuda.few.lanes import Lane
    from moec.compiler.kernels.cuda.few.tiling import Tiling
    from moec.compiler.kernels.emit import Buffer, Expr

    Finish: TypeAlias = Callable[[Expr, Expr, Expr, list[Expr]], None]
    """``(tile, row, token, sums)``: a row among the ``16 * row_warps`` of a tile, and one float32 sum a stream."""

SUM_STRIDE = 20
"""Between tokens in this memory: 16 rows, and 4 that keep its banks apart."""


def partial_size(tiling: Tiling, *, one_tile: bool) -> int:
    """float32 of shared memory through which the warps of a block add up."""
    part = tiling.streams * FEW_TOKENS * SUM_STRIDE
    return (1 if one_tile else 2) * tiling.row_warps * tiling.column_warps * part


class FewSums:
    """What each warp has summed up, for a tile of rows; two of them in turn where a block takes several tiles.

    Args:
        tiling: the block's.
        lane: this thread.
        tokens: of the block, int32.
        end: called once to emit what happens to sums.
        partial: shared memory of ``partial_size`` float32, where the block has it already.
        one_tile: whether it takes one alone.
    """

    def __init__(
        self,
        tiling: Tiling,
        lane: Lane,
        tokens: Expr,
        end: Finish,
        partial: Buffer | None = None,
        *,
        one_tile: bool,
    ) -> None:
        self.tiling, self.lane, self.tokens, self.end, self.one_tile = tiling, lane, tokens, end, one_tile
        self.part_size = tiling.streams * FEW_TOKENS * SUM_STRIDE
        self.bank_size = tiling.row_warps * tiling.column_warps * self.part_size
        self.memory = shared(partial_size(tiling, one_tile=one_tile)) if partial is None else partial

    def _bank(self, tile: Expr) -> Expr:
        return i32(0) if self.one_tile else T.bind(T.bitwise_and(tile, i32(1)) * i32(self.bank_size))

    def place(self, tile: Expr, token: Expr, _number: Expr | None = None, /) -> Expr:
        """Where this lane's warp has its group's row of the first stream; see ``at``."""
        warp = quotient(self.lane.thread, LANES)
        start = self._bank(tile) + warp * i32(self.part_size)
        return T.bind(start + token * i32(SUM_STRIDE) + self.lane.group)

    def at(self, place: Expr, stream: int, half: int, /) -> Expr:
        """The element of a stream and of the row, or of that eight further down."""
        return place + i32(stream * FEW_TOKENS * SUM_STRIDE + 8 * half)

    def store(self, place: Expr, stream: int, half: int, total: Expr, /) -> None:
        """Keep a sum of this warp."""
        store(self.memory, self.at(place, stream, half), total)

    def done(self, tile: Expr, /) -> None:
        """Add up, all threads of a block, and emit what happens to the sums of a tile."""
        tiling, bank = self.tiling, self._bank(tile)
        sync()
        tile_rows = TILE_ROWS * tiling.row_warps
        count = T.bind(self.tokens * i32(tile_rows))
        for first in range(0, FEW_TOKENS * tile_rows, tiling.threads):
            number = T.bind(self.lane.thread + i32(first))
            with when(number < count):
                row, token = T.bind(remainder(number, tile_rows)), T.bind(quotient(number, tile_rows))
                self.end(tile, row, token, self._totals(bank, row, token))

    def _totals(self, bank: Expr, row: Expr, token: Expr) -> list[Expr]:
        warps = self.tiling.column_warps
        place = quotient(row, TILE_ROWS) * i32(warps * self.part_size) + remainder(row, TILE_ROWS)
        place = T.bind(bank + place + token * i32(SUM_STRIDE))
        totals = []
        for stream in range(self.tiling.streams):
            first = stream * FEW_TOKENS * SUM_STRIDE
            total = T.bind(load(self.memory, place + i32(first)))
            for warp in range(1, warps):
                total = T.bind(total + load(self.memory, place + i32(first + warp * self.part_size)))
            totals.append(total)
        return totals
