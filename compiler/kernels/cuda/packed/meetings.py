"""Which tokens the distinct experts of a step meet, and what comes of it: sums of each pair, added up now and then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.lanes import quotient, remainder
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS, LANES, TILE_ROWS
from moec.compiler.kernels.cuda.primitives import i32, registers, shared, sync
from moec.compiler.kernels.emit import load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.few.lanes import Lane
    from moec.compiler.kernels.cuda.few.sums import Finish
    from moec.compiler.kernels.cuda.few.tiling import Tiling
    from moec.compiler.kernels.emit import Buffer, Expr

SUM_BYTES = 12 << 10
"""Of shared memory for sums."""
MOST_HELD = 32
"""Pairs."""


@dataclass(frozen=True)
class Meetings:
    """Which tokens each distinct expert of a step meets, in shared memory; numbers are int32."""

    experts: Expr
    """How many there are."""
    count: Buffer
    """``[experts]``: tokens of each."""
    entry: Buffer
    """``[experts, 8]``: their choices' numbers among the T * K, by which the middle's rows go."""
    chosen: Expr
    """Choices of a token: K."""


class MeetingSums:
    """The sums of each pair of expert and token, in shared memory until no more fit: warps do not wait for each other.

    Args:
        tiling: the block's, of one stream.
        lane: this thread.
        meetings: of the step.
        finish: called once to emit what happens to sums; a tile is an expert.
    """

    def __init__(self, tiling: Tiling, lane: Lane, meetings: Meetings, finish: Finish) -> None:
        self.tiling, self.lane, self.meetings, self.end = tiling, lane, meetings, finish
        warps = tiling.threads // LANES
        self.most = max(FEW_TOKENS, min(MOST_HELD, SUM_BYTES // (4 * warps * TILE_ROWS)))
        self.memory = shared(warps * self.most * TILE_ROWS)
        self.pairs = shared(self.most, "int32")
        self.held = registers(1, "int32")
        store(self.held, 0, i32(0))

    def place(self, tile: Expr, token: Expr, number: Expr, /) -> Expr:
        """Behind the pairs that there are."""
        own = T.bind(load(self.held, 0) + number)
        with when(self.lane.thread == i32(0)):
            store(self.pairs, own, tile * i32(FEW_TOKENS) + token)
        warp = quotient(self.lane.thread, LANES)
        return T.bind((warp * i32(self.most) + own) * i32(TILE_ROWS) + self.lane.group)

    def at(self, place: Expr, _stream: int, half: int) -> Expr:
        """The element of the row, or of that eight further down."""
        return place + i32(8 * half)

    def done(self, tile: Expr) -> None:
        """Count an expert's pairs; finish all where those of the next one may not fit, or there is none."""
        held = T.bind(load(self.held, 0) + load(self.meetings.count, tile))
        last = T.bind(tile + i32(1) == self.meetings.experts)
        store(self.held, 0, held)
        with when(tirx.any(last, held > i32(self.most - FEW_TOKENS))):
            sync()
            self._finish(held)
            sync()
            store(self.held, 0, i32(0))

    def _finish(self, held: Expr) -> None:
        tiling = self.tiling
        rows, across = TILE_ROWS * tiling.row_warps, tiling.column_warps
        turns = quotient(held * i32(rows) + i32(tiling.threads - 1), tiling.threads)
        with T.serial(i32(0), T.bind(turns)) as turn:
            number = T.bind(turn * i32(tiling.threads) + self.lane.thread)
            with when(number < held * i32(rows)):
                row, own = T.bind(remainder(number, rows)), T.bind(quotient(number, rows))
                warp = quotient(row, TILE_ROWS) * i32(across)
                place = T.bind((warp * i32(self.most) + own) * i32(TILE_ROWS) + remainder(row, TILE_ROWS))
                total = T.bind(load(self.memory, place))
                for further in range(1, across):
                    part = load(self.memory, place + i32(further * self.most * TILE_ROWS))
                    total = T.bind(total + part)
                pair = T.bind(load(self.pairs, own))
                self.end(
                    T.bind(quotient(pair, FEW_TOKENS)), row, T.bind(remainder(pair, FEW_TOKENS)), [total]
                )
