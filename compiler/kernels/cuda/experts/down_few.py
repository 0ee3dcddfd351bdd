"""The second launch of the experts of at most eight tokens: ``out[t] = sum_k weight[t, k] * down(middle[t, k])``.

A block has a tile of rows and takes every distinct expert of the step in turn, the weights of the next one on their way
while it multiplies with one. What each choice of a token contributes is kept apart until the end and added in the
order of the choices, so that a token's result does not depend on the others.

The first launch lets the one behind it begin only after its own ``wait_previous``, and this one comes no earlier: what
came before the first launch, the choices and the table among that, may be read here at once, and the first weights are
loaded before the values between the products are there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.experts import layout
from moec.compiler.kernels.cuda.experts.few import packed_row, part_at
from moec.compiler.kernels.cuda.experts.rings import second_tiling
from moec.compiler.kernels.cuda.experts.step import ENTRIES, StepExperts, read_step
from moec.compiler.kernels.cuda.few.held_sums import HeldSums
from moec.compiler.kernels.cuda.few.lanes import Lane, quotient, remainder
from moec.compiler.kernels.cuda.few.multiply import multiply
from moec.compiler.kernels.cuda.few.ring import Ring, ring_elements
from moec.compiler.kernels.cuda.few.stream import WORDS, Stream
from moec.compiler.kernels.cuda.few.sums import FewSums
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS, STEP_COLUMNS, TILE_ROWS, Tiling
from moec.compiler.kernels.cuda.few.tokens import dynamic_pairs
from moec.compiler.kernels.cuda.packed.meetings import Meetings, MeetingSums
from moec.compiler.kernels.cuda.packed.middle import PackedMiddle
from moec.compiler.kernels.cuda.packed.operands import PackedStream
from moec.compiler.kernels.cuda.packed.stream import multiply_packed
from moec.compiler.kernels.cuda.packed.tiling import packed_tiling
from moec.compiler.kernels.cuda.primitives import (
    blocks_at_once,
    call,
    element,
    i32,
    launch,
    launch_next,
    registers,
    shared,
    sync,
    wait_previous,
)
from moec.compiler.kernels.cuda.slots.arrivals import Arrivals
from moec.compiler.kernels.cuda.threads import each_of, read
from moec.compiler.kernels.emit import i64, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cuda.experts.call import ExpertCall
    from moec.compiler.kernels.emit import Buffer, Expr


def emit_down_few(
    body: ExpertBody,
    call_: ExpertCall,
    middle: Buffer,
    tiling: Tiling | None = None,
    state: Buffer | None = None,
) -> None:
    """Emit the second launch; arguments as for ``emit_gate_up_few``."""
    tiling = tiling or down_tiling(body, several=state is None)
    tiles = -(-body.hidden // (TILE_ROWS * tiling.row_warps))
    with launch((tiles,), tiling.threads) as ((tile,), thread):
        blocks_at_once(tiling.blocks)
        arrivals = None if state is None else Arrivals.of(state)
        step = read_step(call_, thread, tiling.threads, arrivals)
        parts = shared(ENTRIES * TILE_ROWS * tiling.row_warps)
        down = _Down(body, call_, middle, tiling, tile, step, parts, arrivals)
        down.clear(thread)
        with when(step.experts > i32(0)):
            down.emit(thread)
        with when(step.experts == i32(0)):
            launch_next()
            wait_previous()
        sync()
        down.store(thread)


def down_tiling(body: ExpertBody, *, several: bool) -> Tiling:
    """How the second launch is cut; ``several`` says that all experts are there, so that it can be ahead of itself."""
    row = packed_row(body, body.intermediate)
    if row is None:
        tiling = second_tiling(body)
        steps = tiling.unroll * tiling.rounds(body.intermediate)
        return tiling if several else replace(tiling, ring=min(tiling.ring, max(2, steps)))
    tiling = packed_tiling(row, body.hidden, in_turn=True)
    return tiling if several else replace(tiling, banks=min(tiling.banks, 2))


@dataclass(frozen=True)
class _Down:
    """What a block of the second launch does for its tile of rows."""

    body: ExpertBody
    call: ExpertCall
    middle: Buffer
    tiling: Tiling
    tile: Expr
    step: StepExperts
    parts: Buffer
    """``[T * K, rows]``: what each choice contributes."""
    arrivals: Arrivals | None

    @property
    def rows(self) -> int:
        return TILE_ROWS * self.tiling.row_warps

    def clear(self, thread: Expr) -> None:
        """Nothing contributes, until it does."""
        for number in each_of(
            thread, self.tiling.threads, self.step.tokens * self.step.chosen * i32(self.rows)
        ):
            store(self.parts, number, T.float32(0))

    def emit(self, thread: Expr) -> None:
        """All products, each into ``parts``."""
        body, tiling, step = self.body, self.tiling, self.step
        lane = Lane.of(thread, tiling)
        offset, packed = layout(body).part("down").offset_bytes, packed_row(body, body.intermediate)
        row_bytes = packed.layout.row_bytes if packed else 2 * body.intermediate

        def locate(expert: Expr, _: int, half: int) -> Expr:
            row = self.tile * i32(self.rows) + lane.row_warp * i32(TILE_ROWS) + lane.group + i32(8 * half)
            row = T.bind(T.min(row, i32(body.hidden - 1)))
            start = load(step.address, expert) + i64(offset)
            return start + T.cast(row, "int64") * i64(row_bytes)

        def arrive(expert: Expr) -> None:
            assert self.arrivals is not None
            self.arrivals.wait(T.bind(load(step.expert, expert)), 1, thread)

        begin = None if self.arrivals is None else arrive
        if packed:
            values = PackedMiddle(packed, self.middle, self._meetings(thread), lane, tiling)
            packed_stream = PackedStream(tiling, packed, step.tokens, step.experts, locate, begin)
            meeting = MeetingSums(tiling, lane, values.meetings, self._finish)
            multiply_packed(packed_stream, lane, values, meeting)
            return
        stream = Stream(tiling, body.dtype, body.intermediate, step.tokens, step.experts, locate, begin)
        activations = _MiddleTokens(body.intermediate, self.middle, step.pick, lane, tiling)
        if not tiling.ring:
            sums = FewSums(tiling, lane, step.tokens, self._finish, one_tile=False)
            multiply(stream, lane, activations, sums)
            return
        held = HeldSums(tiling, lane, step.tokens, step.experts, self._finish)
        multiply(stream, lane, activations, held, Ring(dynamic_pairs(ring_elements(tiling)), 0))

    def _meetings(self, thread: Expr) -> Meetings:
        """Which tokens each expert meets, without gaps."""
        step = self.step
        count, entry = shared(ENTRIES, "int32"), shared(ENTRIES * FEW_TOKENS, "int32")
        for number in each_of(thread, self.tiling.threads, step.experts * i32(FEW_TOKENS)):
            own, first = T.bind(remainder(number, FEW_TOKENS)), T.bind(number - remainder(number, FEW_TOKENS))
            before = registers(1, "int32")
            store(before, 0, i32(0))
            with T.serial(i32(0), own) as other:
                present = load(step.pick, first + other) >= i32(0)
                store(before, 0, load(before, 0) + T.cast(present, "int32"))
            picked, place = T.bind(load(step.pick, number)), T.bind(first + load(before, 0))
            with when(picked >= i32(0)):
                store(entry, place, picked)
            with when(own == i32(FEW_TOKENS - 1)):
                total = load(before, 0) + T.cast(picked >= i32(0), "int32")
                store(count, quotient(number, FEW_TOKENS), total)
        sync()
        return Meetings(step.experts, count, entry, step.chosen)

    def _finish(self, expert: Expr, local: Expr, token: Expr, sums: list[Expr]) -> None:
        body, step = self.body, self.step
        row = T.bind(self.tile * i32(self.rows) + local)
        picked = load(step.pick, expert * i32(FEW_TOKENS) + token) >= i32(0)
        with when(tirx.all(picked, row < i32(body.hidden))):
            (total,) = sums
            if body.down_bias:
                bias = part_at(body, "down_bias", T.bind(load(step.address, expert)))
                total = total + read(bias, body.dtype, T.cast(row, "int64"))
            total, own = T.bind(total), T.bind(load(step.expert, expert))
            with T.serial(i32(0), step.chosen) as k:
                entry = T.bind(token * step.chosen + k)
                with when(load(step.chosen_expert, entry) == own):
                    store(self.parts, entry * i32(self.rows) + local, load(step.weight, entry) * total)

    def store(self, thread: Expr) -> None:
        """Add up what a token's choices contribute."""
        body, step = self.body, self.step
        for number in each_of(thread, self.tiling.threads, step.tokens * i32(self.rows)):
            local, token = T.bind(remainder(number, self.rows)), T.bind(quotient(number, self.rows))
            row = T.bind(self.tile * i32(self.rows) + local)
            with when(row < i32(body.hidden)):
                total = registers(1)
                store(total, i32(0), T.float32(0))
                with T.serial(i32(0), step.chosen) as k:
                    part = load(self.parts, (token * step.chosen + k) * i32(self.rows) + local)
                    store(total, i32(0), load(total, i32(0)) + part)
                place = T.cast(token, "int64") * i64(body.hidden) + T.cast(row, "int64")
                store(self.call.out, place, load(total, i32(0)))


class _MiddleTokens:
    """The values between the products, from global memory straight into registers: a block reads each once."""

    def __init__(self, columns: int, middle: Buffer, pick: Buffer, lane: Lane, tiling: Tiling) -> None:
        self.columns, self.middle, self.pick, self.lane = columns, middle, pick, lane
        self.words = registers(2 * WORDS * tiling.unroll, "uint32")

    def ready(self) -> None:
        """Wait for the first launch."""
        launch_next()
        wait_previous()

    def prefetch(self, slot: int, tile: Expr, column: Expr, valid: Expr | None) -> None:
        """Load a step of this lane's token, where it chose the expert."""
        entry = T.bind(load(self.pick, tile * i32(FEW_TOKENS) + self.lane.group))
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
