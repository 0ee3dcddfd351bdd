"""A linear recurrence over a matrix for each head: a block takes 32 columns of a head's state through a run.

Each lane of a warp has a column, each warp its share of the rows, in registers from the first token of the run to the
last. What tokens bring is staged in shared memory, several of them at a time, with ``k . q`` beside it. Products of a
column with the key and with the query are summed over warps together: the result after the write is
``S^T q + (k . q) w``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.operands import settled
from moec.compiler.kernels.cuda.primitives import LANES, i32, registers, sync, value, warp_sum
from moec.compiler.kernels.cuda.states.runs import Run, runs_of_few_tokens, runs_of_rows
from moec.compiler.kernels.cuda.states.staging import Staging
from moec.compiler.kernels.cuda.states.sums import FOUR, WarpSums, four
from moec.compiler.kernels.emit import Buffer, Expr, either, i64, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.states import RecurrenceSpec
    from moec.compiler.kernels.cpu.states.operands import StateOperands
    from moec.compiler.kernels.cuda.states.staging import Stage

MOST_WARPS = 8
FEWEST_ROWS = 4
"""Of a warp, where it shares the rows with others."""
MOST_STAGED_TOKENS = 8
"""More take registers and shared memory from other blocks."""


def recurrence(spec: RecurrenceSpec, operands: StateOperands) -> None:
    """Emit the launches: short runs stage a token at a time, and leave room for other blocks."""
    short, long = _Recurrence(spec, operands, 1), _Recurrence(spec, operands, MOST_STAGED_TOKENS)
    blocks, threads = spec.value_heads * long.blocks, LANES * long.warps
    either(
        operands.tokens <= operands.rows,
        lambda: runs_of_few_tokens(operands, blocks, threads, short.run),
        lambda: runs_of_rows(operands, blocks, threads, long.run),
    )


@dataclass(frozen=True)
class _Place:
    """What a thread knows of itself; int32."""

    run: Run
    head: Expr
    first_column: Expr
    """Of the block, within the head."""
    column: Expr
    """The thread's; the last one where there are no more."""
    inside: Expr
    lane: Expr
    warp: Expr
    thread: Expr


class _Recurrence:
    """The parts of the kernel while it is emitted."""

    def __init__(self, spec: RecurrenceSpec, operands: StateOperands, most_staged: int) -> None:
        self.spec, self.operands = spec, operands
        self.blocks = -(-spec.value_dim // LANES)
        self.warps = next(
            warps
            for warps in (MOST_WARPS, 4, 2, 1)
            if warps == 1 or (spec.key_dim % warps == 0 and spec.key_dim // warps >= FEWEST_ROWS)
        )
        self.rows = spec.key_dim // self.warps
        self.group = FOUR if self.rows % FOUR == 0 else 1
        """Rows whose key, query and decay are read together."""
        self.staging = Staging(spec, operands.inputs, most_staged, LANES * self.warps)

    def run(self, run: Run, block: Expr, thread: Expr) -> None:
        """All tokens of a run for one block."""
        lane, warp = T.truncmod(thread, i32(LANES)), T.truncdiv(thread, i32(LANES))
        head, part = T.truncdiv(block, i32(self.blocks)), T.truncmod(block, i32(self.blocks))
        first_column = settled(part * i32(LANES))
        column = settled(first_column + lane)
        last = i32(self.spec.value_dim - 1)
        place = _Place(
            run,
            settled(head),
            first_column,
            settled(T.min(column, last)),
            T.bind(column <= last),
            settled(lane),
            settled(warp),
            thread,
        )
        state, rates = registers(self.rows), self._rates(place)
        first = self._state(place)
        for row in range(self.rows):
            held = load(self.operands.state, first + i64(row * self.spec.value_dim))
            store(state, row, T.Select(run.position.equal(i32(0)), T.float32(0), held))
        stage, sums = self.staging.reserve(), WarpSums(self.warps, 2 if self.spec.delta else 1)
        together = self.staging.tokens
        with T.serial(i32(0), (run.end - run.first + i32(together - 1)) // i32(together)) as turn:
            begin = settled(run.first + turn * i32(together))
            count = settled(T.min(i32(together), run.end - begin))
            with when(turn > i32(0)):
                sync()
            self.staging.bring(stage, place.head, place.first_column, begin, count, thread)
            sync()
            self._products(place, stage, count)
            if self.warps == 1:  # else there is a barrier before they are read
                sync()
            with T.serial(i32(0), count) as number:
                self._token(place, stage, sums, begin, settled(number), state, rates)
        with when(place.inside):
            for row in range(self.rows):
                store(self.operands.state, first + i64(row * self.spec.value_dim), load(state, row))

    def _token(
        self,
        place: _Place,
        stage: Stage,
        sums: WarpSums,
        begin: Expr,
        number: Expr,
        state: Buffer,
        rates: Buffer | None,
    ) -> None:
        own = settled(number * i32(self.spec.key_dim) + place.warp * i32(self.rows))
        column = settled(number * i32(LANES) + place.lane)
        parts, keys = registers(sums.width), registers(self.rows)
        for part in range(sums.width):
            store(parts, part, T.float32(0))
        common = load(stage.factor, number) if self.spec.decay == "head" else None
        for first in range(0, self.rows, self.group):
            together = [self._together(each, own, first) for each in (stage.key, stage.query)]
            decays = self._together(stage.factor, own, first) if self.spec.decay == "channel" else None
            for row, (key, asked) in enumerate(zip(*together, strict=True), first):
                factor = (
                    self._factor(stage, common, column, row, rates) if decays is None else decays[row - first]
                )
                held = T.bind(load(state, row) * factor)
                store(state, row, held)
                store(keys, row, key)
                store(parts, 0, load(parts, 0) + asked * held)
                if self.spec.delta:
                    store(parts, 1, load(parts, 1) + key * held)
        summed = sums.over_warps(parts, place.warp, place.lane, begin + number)
        written = T.bind(load(stage.value, column))
        if stage.beta is not None:
            written = T.bind(load(stage.beta, number) * (written - summed[1]))
        for row in range(self.rows):
            store(state, row, load(state, row) + load(keys, row) * written)
        with when(T.And(place.inside, place.warp.equal(i32(0)))):
            result = summed[0] + load(stage.product, number) * written
            store(self.operands.out, self._out(place, begin + number), result)

    def _together(self, buffer: Buffer, own: Expr, row: int) -> list[Expr]:
        """Numbers of `group` rows."""
        return [T.bind(load(buffer, own + i32(row)))] if self.group == 1 else four(buffer, own + i32(row))

    def _products(self, place: _Place, stage: Stage, count: Expr) -> None:
        """``k . q`` of what is staged, a token for each warp."""
        size = self.spec.key_dim
        with T.serial(i32(0), (count + i32(self.warps - 1)) // i32(self.warps)) as turn:
            token = settled(turn * i32(self.warps) + place.warp)
            with when(token < count):
                total = registers(1)
                store(total, 0, T.float32(0))
                for first in range(0, size, LANES):
                    row = settled(i32(first) + place.lane)
                    with when(row < i32(size)):
                        at = settled(token * i32(size) + row)
                        store(total, 0, load(total, 0) + load(stage.key, at) * load(stage.query, at))
                product = warp_sum(load(total, 0))
                with when(place.lane.equal(i32(0))):
                    store(stage.product, token, product)

    def _factor(self, stage: Stage, common: Expr, column: Expr, row: int, rates: Buffer | None) -> Expr:
        """What one row of a thread's column decays by, where tokens do not bring it for each row."""
        if self.spec.decay == "rates":
            return value("float32", "exp", load(stage.factor, column) * load(rates, row))
        return load(rates, 0) if self.spec.decay == "fixed" else common

    def _rates(self, place: _Place) -> Buffer | None:
        """A thread's weights: a rate for each row, or what a head decays by always."""
        spec = self.spec
        if spec.decay == "fixed":
            rates = registers(1)
            store(rates, 0, value("float32", "exp", load(self.operands.weights[0], place.head)))
            return rates
        if spec.decay != "rates":
            return None
        rates = registers(self.rows)
        first = (place.head * i32(spec.key_dim) + place.warp * i32(self.rows)) * i32(spec.value_dim)
        for row in range(self.rows):
            at = first + i32(row * spec.value_dim) + place.column
            store(rates, row, load(self.operands.weights[0], at))
        return rates

    def _state(self, place: _Place) -> Expr:
        """Where the thread's first number of the state lies."""
        spec = self.spec
        head = i64(place.run.row) * i64(spec.value_heads) + i64(place.head)
        row = head * i64(spec.key_dim) + i64(place.warp) * i64(self.rows)
        return T.bind(row * i64(spec.value_dim) + i64(place.column))

    def _out(self, place: _Place, token: Expr) -> Expr:
        line = i64(token) * i64(self.spec.value_heads) + i64(place.head)
        return T.bind(line * i64(self.spec.value_dim) + i64(place.column))
