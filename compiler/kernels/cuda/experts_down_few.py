"""The second launch of the experts of at most eight tokens: ``out[t] = sum_k weight[t, k] * down(middle[t, k])``.

A block has a tile of rows of every distinct expert of the step. Its warps take the experts in turn, so many warps side
by side, each with a part of the columns: none waits for another before all are done, and with one token each has one
expert's part, whose weights it loads before the values between the products are there.

The first launch lets the one behind it begin only after its own ``wait_previous``, and this one comes no earlier: what
came before the first launch, the choices and the table among that, may be read here at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.experts import layout
from moec.compiler.kernels.cpu.emit import either, i64, load
from moec.compiler.kernels.cuda.choice_sums import ChoiceSums
from moec.compiler.kernels.cuda.experts_few import packed_row
from moec.compiler.kernels.cuda.experts_step import Meetings, read_step
from moec.compiler.kernels.cuda.few_lanes import Lane
from moec.compiler.kernels.cuda.few_stream import WORDS, Stream, multiply
from moec.compiler.kernels.cuda.few_tiling import FEW_TOKENS, STEP_COLUMNS, TILE_ROWS, Tiling, choose_tiling
from moec.compiler.kernels.cuda.packed.middle import PackedMiddle
from moec.compiler.kernels.cuda.packed.stream import PackedStream, multiply_packed
from moec.compiler.kernels.cuda.packed.tiling import packed_tiling
from moec.compiler.kernels.cuda.primitives import (
    blocks_at_once,
    call,
    element,
    i32,
    launch,
    launch_next,
    registers,
    sync,
    wait_previous,
)
from moec.compiler.kernels.cuda.slots.arrivals import Arrivals

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cpu.emit import Buffer, Expr
    from moec.compiler.kernels.cuda.experts_few import ExpertCall
    from moec.compiler.kernels.cuda.experts_step import Step


def emit_down_few(
    body: ExpertBody,
    call_: ExpertCall,
    middle: Buffer,
    tiling: Tiling | None = None,
    state: Buffer | None = None,
) -> None:
    """Emit the second launch; arguments as for ``emit_gate_up_few``."""
    tiling = tiling or down_tiling(body)
    tiles = -(-body.hidden // (TILE_ROWS * tiling.row_warps))
    with launch((tiles,), tiling.threads) as ((tile,), thread):
        blocks_at_once(tiling.blocks)
        arrivals = None if state is None else Arrivals.of(state)
        step = read_step(call_, thread, tiling.threads, arrivals)
        lane = Lane.of(thread, tiling)
        sums = ChoiceSums(body, call_, tiling, lane, step, thread)
        down = _Down(body, middle, tiling, tile, step, lane, sums, arrivals)
        down.emit(thread)
        sync()
        sums.finish(tile, thread)


def down_tiling(body: ExpertBody) -> Tiling:
    """How the second launch is cut."""
    row = packed_row(body, body.intermediate)
    if row is None:
        return choose_tiling(body.hidden, body.intermediate)
    return packed_tiling(row, body.hidden, in_turn=True)


@dataclass(frozen=True)
class _Down:
    """What a block of the second launch does for its tile of rows."""

    body: ExpertBody
    middle: Buffer
    tiling: Tiling
    tile: Expr
    step: Step
    lane: Lane
    sums: ChoiceSums
    arrivals: Arrivals | None

    def _expert(self, turn: Expr) -> Expr:
        """The expert, among the distinct ones, that a warp takes in one of its turns."""
        return turn * i32(self.tiling.turns) + self.lane.turn

    def emit(self, thread: Expr) -> None:
        """All products."""
        body, tiling, step, lane = self.body, self.tiling, self.step, self.lane
        offset, packed = layout(body).part("down").offset_bytes, packed_row(body, body.intermediate)
        row_bytes = packed.layout.row_bytes if packed else 2 * body.intermediate
        turns = T.bind(
            T.truncdiv(step.experts - lane.turn + i32(tiling.turns - 1), i32(tiling.turns))
        )  # of this warp

        def locate(turn: Expr, _: int, half: int) -> Expr:
            row = self.tile * i32(TILE_ROWS * tiling.row_warps) + lane.row_warp * i32(TILE_ROWS)
            row = T.bind(T.min(row + lane.group + i32(8 * half), i32(body.hidden - 1)))
            start = load(step.address, self._expert(turn)) + i64(offset)
            return start + T.cast(row, "int64") * i64(row_bytes)

        def arrive(turn: Expr) -> None:
            assert self.arrivals is not None
            self.arrivals.wait_warp(T.bind(load(step.expert, self._expert(turn))), 1, thread)

        begin = None if self.arrivals is None else arrive
        if packed:
            meetings = Meetings.of(step, thread, tiling.threads)
            ring = PackedMiddle(packed, self.middle, meetings, lane, tiling)
            packed_stream = PackedStream(tiling, packed, step.tokens, turns, locate, begin)
            products = lambda: multiply_packed(packed_stream, lane, ring, self.sums)  # noqa: E731
        else:
            stream = Stream(tiling, body.dtype, body.intermediate, step.tokens, turns, locate, begin)
            activations = _MiddleTokens(body.intermediate, self.middle, step.pick, lane, tiling)
            products = lambda: multiply(stream, lane, activations, self.sums)  # noqa: E731
        either(turns > i32(0), products, _idle)


def _idle() -> None:
    """A warp without an expert."""
    launch_next()
    wait_previous()


class _MiddleTokens:
    """The values between the products, from global memory straight into registers: a warp reads each once."""

    def __init__(self, columns: int, middle: Buffer, pick: Buffer, lane: Lane, tiling: Tiling) -> None:
        self.columns, self.middle, self.pick, self.lane, self.turns = (
            columns,
            middle,
            pick,
            lane,
            tiling.turns,
        )
        self.words = registers(2 * WORDS * tiling.unroll, "uint32")

    def ready(self) -> None:
        """Wait for the first launch."""
        launch_next()
        wait_previous()

    def prefetch(self, slot: int, tile: Expr, column: Expr, valid: Expr | None) -> None:
        """Load a step of this lane's token, where it chose the expert."""
        expert = tile * i32(self.turns) + self.lane.turn
        entry = T.bind(load(self.pick, expert * i32(FEW_TOKENS) + self.lane.group))
        present = entry >= i32(0) if valid is None else tirx.all(valid, entry >= i32(0))
        place = T.cast(entry, "int64") * i64(2 * self.columns) + T.cast(column, "int64")
        place = T.bind(place + i64(STEP_COLUMNS * slot))
        for part in range(2):
            target = element(self.words, (2 * slot + part) * WORDS)
            call("load_16_if", target, element(self.middle, place + i64(part * self.columns)), present)

    def prepare(self, tile: Expr, round_: Expr) -> None:
        """Nothing: what a round needs has been loaded with its weights."""

    def operands(self, slot: int, _: Expr) -> tuple[list[Expr], list[Expr]]:
        """What ``prefetch`` has loaded."""
        hi, lo = (
            [load(self.words, i32((2 * slot + part) * WORDS + i)) for i in range(WORDS)] for part in (0, 1)
        )
        return hi, lo
