"""The values between the two products of experts, for packed weights: a ring in shared memory for each warp.

They lie in memory in ``OperandOrder``. A warp needs the columns of its own steps alone, so it copies these by itself,
for one token of an expert and one round at a time, several of them ahead; no other warp has to wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.lanes import quotient
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS, LANES
from moec.compiler.kernels.cuda.few.tokens import LEAST_DYNAMIC_BYTES
from moec.compiler.kernels.cuda.packed.order import LINE, PIECE, OperandOrder
from moec.compiler.kernels.cuda.packed.tokens import brings, read_operands
from moec.compiler.kernels.cuda.primitives import (
    call,
    element,
    i32,
    launch_next,
    registers,
    shared_dynamic,
    wait_previous,
)
from moec.compiler.kernels.emit import i64, load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.few.lanes import Lane
    from moec.compiler.kernels.cuda.few.tiling import Tiling
    from moec.compiler.kernels.cuda.packed.meetings import Meetings
    from moec.compiler.kernels.cuda.packed.rows import PackedRow
    from moec.compiler.kernels.emit import Buffer, Expr

MOST_AHEAD = 8
"""Copies that a warp has under way."""


class PackedMiddle:
    """The values between the products.

    Args:
        row: of the second product's weights.
        middle: uint16 ``[T * K, elements]``.
        meetings: of the step.
        lane: this thread.
        tiling: the block's.
    """

    def __init__(
        self, row: PackedRow, middle: Buffer, meetings: Meetings, lane: Lane, tiling: Tiling
    ) -> None:
        self.order = OperandOrder.of(row.kind)
        self.middle, self.meetings, self.lane, self.tiling = middle, meetings, lane, tiling
        self.elements = self.order.elements(row.columns)
        self.rounds = tiling.rounds(row.columns)
        self.step_elements = self.order.loads * LINE
        self.size = tiling.unroll * self.step_elements
        warps = tiling.threads // LANES
        self.ahead = max(1, min(MOST_AHEAD, LEAST_DYNAMIC_BYTES // (2 * self.size * warps)))
        self.ring = shared_dynamic(max(warps * self.ahead * self.size, LEAST_DYNAMIC_BYTES // 2), "uint16")
        self.state = registers(5, "int32")
        for place in range(5):
            store(self.state, place, i32(0))

    EXPERT, ROUND, NUMBER, HEAD, TAIL = range(5)
    """What is copied next, and into which place of the ring; the place that is read next."""

    def ready(self) -> None:
        """Wait for the first launch, and start the first copies."""
        launch_next()
        wait_previous()
        warp = quotient(self.lane.thread, LANES)
        self.start = T.bind(warp * i32(self.ahead * self.size))
        self.own = T.bind(self.lane.thread - warp * i32(LANES))
        for _ in range(self.ahead):
            self._copy()

    def prepare(self, tile: Expr, round_: Expr) -> None:
        """Nothing: copies go on token by token."""

    def count(self, tile: Expr, /) -> Expr:
        """Tokens of the expert."""
        return T.bind(load(self.meetings.count, tile))

    def token(self, tile: Expr, number: Expr, /) -> Expr:
        """One of them."""
        entry = load(self.meetings.entry, tile * i32(FEW_TOKENS) + number)
        return T.bind(T.truncdiv(entry, self.meetings.chosen))

    def arrive(self) -> None:
        """Wait for the oldest copy."""
        call("copy_wait", i32(self.ahead - 1))
        call("sync_warp")

    def operands(self, slot: int, _round: Expr, _number: Expr, /) -> list[Expr]:
        """This lane's words of a step."""
        place = self.start + load(self.state, self.TAIL) * i32(self.size)
        place = T.bind(place + i32(slot * self.step_elements) + self.lane.group * i32(PIECE))
        return read_operands(self.ring, place, brings(self.lane), self.order)

    def leave(self) -> None:
        """Start the next copy, into the place that has been read."""
        call("sync_warp")
        self._advance(self.TAIL, self.ahead)
        self._copy()

    def _advance(self, what: int, limit: int | Expr) -> Expr:
        """Count up, from the limit on again from zero; returns whether that is so."""
        following = T.bind(load(self.state, what) + i32(1))
        wraps = T.bind(following >= (i32(limit) if isinstance(limit, int) else limit))
        store(self.state, what, T.Select(wraps, i32(0), following))
        return wraps

    def _copy(self) -> None:
        """Start copying this warp's columns of the next token, where there is one."""
        expert, round_ = T.bind(load(self.state, self.EXPERT)), T.bind(load(self.state, self.ROUND))
        with when(expert < self.meetings.experts):
            place = expert * i32(FEW_TOKENS) + load(self.state, self.NUMBER)
            entry = T.bind(load(self.meetings.entry, place))
            first = (round_ * i32(self.tiling.column_warps) + self.lane.column_warp) * i32(self.size)
            source = T.bind(i64(entry) * i64(self.elements))
            target = self.start + load(self.state, self.HEAD) * i32(self.size)
            pieces = self.size // PIECE
            for number in range(0, pieces, LANES):
                piece = T.bind(self.own + i32(number))
                column = T.bind(first + piece * i32(PIECE))
                valid = T.bind(column < i32(self.elements))
                origin = T.Select(valid, source + i64(column), i64(0))
                with when(piece < i32(pieces)):
                    arguments = (
                        element(self.ring, T.bind(target + piece * i32(PIECE))),
                        element(self.middle, T.bind(origin)),
                        valid,
                    )
                    call("copy_async_16_if", *arguments)
            self._follow(expert)
        call("copy_commit")
        self._advance(self.HEAD, self.ahead)

    def _follow(self, expert: Expr) -> None:
        """The next token, then the next round, then the next expert."""
        over = self._advance(self.NUMBER, load(self.meetings.count, expert))
        if self.rounds > 1:
            following = T.bind(load(self.state, self.ROUND) + T.cast(over, "int32"))
            over = T.bind(following >= i32(self.rounds))
            store(self.state, self.ROUND, T.Select(over, i32(0), following))
        store(self.state, self.EXPERT, expert + T.cast(over, "int32"))
