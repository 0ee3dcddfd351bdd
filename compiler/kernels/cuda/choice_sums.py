"""What each choice of a token contributes to its result: kept apart by warps until all are there, then added up.

Warps do not wait for each other: what they write to is theirs alone. In the end it is added in the order of a token's
choices, so that a token's result does not depend on the others, nor on which expert was there first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.emit import i64, load, store, when
from moec.compiler.kernels.cuda.experts_few import part_at
from moec.compiler.kernels.cuda.experts_step import ENTRIES, each
from moec.compiler.kernels.cuda.few_lanes import quotient, remainder
from moec.compiler.kernels.cuda.few_tiling import FEW_TOKENS, TILE_ROWS
from moec.compiler.kernels.cuda.primitives import i32, registers, shared
from moec.compiler.kernels.cuda.threads import read

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cpu.emit import Buffer, Expr
    from moec.compiler.kernels.cuda.experts_few import ExpertCall
    from moec.compiler.kernels.cuda.experts_step import Step
    from moec.compiler.kernels.cuda.few_lanes import Lane
    from moec.compiler.kernels.cuda.few_tiling import Tiling


class ChoiceSums:
    """The sums of the second product of experts, for a block of rows.

    Args:
        body: the experts.
        call_: what the kernel was called with.
        tiling: the block's; a tile of a warp is one of its experts.
        lane: this thread.
        step: the choices.
        thread: int32.
    """

    def __init__(
        self, body: ExpertBody, call_: ExpertCall, tiling: Tiling, lane: Lane, step: Step, thread: Expr
    ) -> None:
        self.body, self.call, self.tiling, self.lane, self.step = body, call_, tiling, lane, step
        self.rows = TILE_ROWS * tiling.row_warps
        self.memory: Buffer = shared(tiling.column_warps * ENTRIES * self.rows)
        self.source = shared(ENTRIES, "int32")
        self._find_sources(thread)

    def _find_sources(self, thread: Expr) -> None:
        """Whose sums each choice takes: those of the first one of the same token and expert; -1 where there is none."""
        step = self.step
        for entry in each(thread, self.tiling.threads, step.tokens * step.chosen):
            own = T.bind(load(step.chosen_expert, entry))
            first = T.bind(entry - T.truncmod(entry, step.chosen))
            store(self.source, entry, T.Select(own >= i32(0), entry, i32(-1)))
            with T.serial(i32(0), T.bind(entry - first)) as back:
                other = T.bind(entry - i32(1) - back)
                same = load(step.chosen_expert, other) == own
                with when(T.And(own >= i32(0), same)):
                    store(self.source, entry, other)

    def _entry(self, tile: Expr, token: Expr) -> Expr:
        """A token's choice of the expert that is a tile of this warp, -1 for none."""
        expert = tile * i32(self.tiling.turns) + self.lane.turn
        return load(self.step.pick, expert * i32(FEW_TOKENS) + token)

    def present(self, tile: Expr, token: Expr, /) -> Expr:
        """Whether a token chose an expert."""
        return self._entry(tile, token) >= i32(0)

    def place(self, tile: Expr, token: Expr, /) -> Expr:
        """Where this lane's warp has its group's row."""
        place = self.lane.column_warp * i32(ENTRIES) + self._entry(tile, token)
        row = self.lane.row_warp * i32(TILE_ROWS) + self.lane.group
        return T.bind(place * i32(self.rows) + row)

    def at(self, place: Expr, _stream: int, half: int, /) -> Expr:
        """The element of the row, or of that eight further down."""
        return place + i32(8 * half)

    def store(self, place: Expr, stream: int, half: int, total: Expr, /) -> None:
        """Keep a sum."""
        store(self.memory, self.at(place, stream, half), total)

    def done(self, _tile: Expr, /) -> None:
        """Nothing: no warp has to wait."""

    def finish(self, tile: Expr, thread: Expr) -> None:
        """Add up what a token's choices contribute, all warps' sums being there, and store the block's rows."""
        step, hidden = self.step, self.body.hidden
        for number in each(thread, self.tiling.threads, step.tokens * i32(self.rows)):
            local, token = T.bind(remainder(number, self.rows)), T.bind(quotient(number, self.rows))
            row = T.bind(tile * i32(self.rows) + local)
            with when(row < i32(hidden)):
                total = registers(1)
                store(total, i32(0), T.float32(0))
                with T.serial(i32(0), step.chosen) as k:
                    entry = T.bind(token * step.chosen + k)
                    source = T.bind(load(self.source, entry))
                    with when(source >= i32(0)):
                        part = self._part(source, local, row)
                        store(total, i32(0), load(total, i32(0)) + load(step.weight, entry) * part)
                place = T.cast(token, "int64") * i64(hidden) + T.cast(row, "int64")
                store(self.call.out, place, load(total, i32(0)))

    def _part(self, source: Expr, local: Expr, row: Expr) -> Expr:
        """What an expert makes of a token."""
        place = T.bind(source * i32(self.rows) + local)
        part = load(self.memory, place)
        for warp in range(1, self.tiling.column_warps):
            part = part + load(self.memory, place + i32(warp * ENTRIES * self.rows))
        if self.body.down_bias:
            expert = T.cast(load(self.step.chosen_expert, source), "int64")
            address = T.bind(load(self.call.table, expert))
            part = part + read(
                part_at(self.body, "down_bias", address), self.body.dtype, T.cast(row, "int64")
            )
        return T.bind(part)
