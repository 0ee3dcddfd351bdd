"""Sums of the warps of a block for several tiles, added up through shared memory when it has no room for more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.lanes import quotient, remainder
from moec.compiler.kernels.cuda.few.sums import SUM_STRIDE
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS, LANES, TILE_ROWS
from moec.compiler.kernels.cuda.primitives import i32, shared, sync
from moec.compiler.kernels.cuda.threads import each_of
from moec.compiler.kernels.emit import load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.few.lanes import Lane
    from moec.compiler.kernels.cuda.few.sums import Finish
    from moec.compiler.kernels.cuda.few.tiling import Tiling
    from moec.compiler.kernels.emit import Expr

HELD_BYTES = 8 << 10
"""Of sums that a block holds, or those of one tile and eight tokens where they are more."""


class HeldSums:
    """What each warp has summed up, of one stream, for as many tiles as there is room for.

    Warps do not meet at the end of each tile, and what comes after a sum is done for many at once.

    Args:
        tiling: the block's.
        lane: this thread.
        tokens: of the block, int32.
        tiles: that the block takes, int32.
        end: called once to emit what happens to sums.
    """

    def __init__(self, tiling: Tiling, lane: Lane, tokens: Expr, tiles: Expr, end: Finish) -> None:
        self.tiling, self.lane, self.tokens, self.tiles, self.end = tiling, lane, tokens, tiles, end
        self.warps = tiling.row_warps * tiling.column_warps
        size = max(self.warps * FEW_TOKENS * SUM_STRIDE, HELD_BYTES // 4)
        self.memory = shared(size)
        self.tile_size = T.bind(tokens * i32(self.warps * SUM_STRIDE))
        self.held = T.bind(T.truncdiv(i32(size), self.tile_size))

    def place(self, tile: Expr, token: Expr, /) -> Expr:
        """Where this lane's warp has its group's row; see ``at``."""
        start = T.bind(T.truncmod(tile, self.held)) * self.tile_size
        warp = quotient(self.lane.thread, LANES)
        return T.bind(start + (warp * self.tokens + token) * i32(SUM_STRIDE) + self.lane.group)

    def at(self, place: Expr, _stream: int, half: int, /) -> Expr:
        """The element of the row, or of that eight further down."""
        return place + i32(8 * half)

    def store(self, place: Expr, stream: int, half: int, total: Expr, /) -> None:
        """Keep a sum of this warp."""
        store(self.memory, self.at(place, stream, half), total)

    def done(self, tile: Expr, /) -> None:
        """Where there is room for no more, or no more comes: add up, all threads of a block, and go on with sums."""
        number = T.bind(T.truncmod(tile, self.held))
        rows = TILE_ROWS * self.tiling.row_warps
        with when(tirx.any(number == self.held - i32(1), tile == self.tiles - i32(1))):
            sync()
            each = T.bind(self.tokens * i32(rows))
            for item in each_of(self.lane.thread, self.tiling.threads, (number + i32(1)) * each):
                before, own = T.bind(T.truncdiv(item, each)), T.bind(T.truncmod(item, each))
                row, token = T.bind(remainder(own, rows)), T.bind(quotient(own, rows))
                self.end(tile - number + before, row, token, [self._total(before, row, token)])
            sync()

    def _total(self, before: Expr, row: Expr, token: Expr) -> Expr:
        """Of the column's warps, in their order."""
        warps = self.tiling.column_warps
        first = before * self.tile_size + remainder(row, TILE_ROWS)
        first = first + (quotient(row, TILE_ROWS) * i32(warps) * self.tokens + token) * i32(SUM_STRIDE)
        place, step = T.bind(first), T.bind(self.tokens * i32(SUM_STRIDE))
        total = T.bind(load(self.memory, place))
        for warp in range(1, warps):
            total = T.bind(total + load(self.memory, place + i32(warp) * step))
        return total
