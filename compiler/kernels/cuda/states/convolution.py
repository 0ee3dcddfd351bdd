"""A causal convolution of each channel: a thread a channel, and where a step has many tokens, a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.operands import settled
from moec.compiler.kernels.cuda.primitives import i32, launch, launch_next, registers, wait_previous
from moec.compiler.kernels.cuda.states.runs import Run, runs_of_few_tokens, runs_of_rows
from moec.compiler.kernels.emit import Buffer, Expr, either, i64, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.states import ConvolutionSpec
    from moec.compiler.kernels.cpu.states.operands import StateOperands

THREADS = 128


def convolution(spec: ConvolutionSpec, operands: StateOperands) -> None:
    """Emit the launches.

    Few tokens: each thread takes a channel of a run from token to token, its window in registers. Many: all at once,
    which read the states that were there before the step, and then a launch that makes the new ones.
    """
    kernel = _Convolution(spec, operands)

    def few() -> None:
        runs_of_few_tokens(operands, kernel.blocks, THREADS, kernel.run)

    def many() -> None:
        kernel.tokens()
        runs_of_rows(operands, kernel.blocks, THREADS, kernel.keep)

    either(operands.tokens <= operands.rows, few, many)


class _Convolution:
    """The parts of the kernels while they are emitted."""

    def __init__(self, spec: ConvolutionSpec, operands: StateOperands) -> None:
        self.spec, self.operands = spec, operands
        self.blocks = -(-spec.channels // THREADS)
        self.past = spec.width - 1
        self.x = operands.inputs[0]
        self.weight, *bias = operands.weights
        self.bias = bias[0] if bias else None

    def run(self, run: Run, block: Expr, thread: Expr) -> None:
        """Results of a run, and its new state, token by token."""
        channel = settled(block * i32(THREADS) + thread)
        with when(channel < i32(self.spec.channels)):
            window, taps = registers(self.past), registers(self.spec.width)
            for tap in range(self.past):
                held = load(self.operands.state, self._state(run.row, i32(tap), channel))
                store(window, tap, T.Select(run.position.equal(i32(0)), T.float32(0), held))
            for tap in range(self.spec.width):
                store(taps, tap, load(self.weight, i32(tap * self.spec.channels) + channel))
            with T.serial(i32(0), run.end - run.first) as number:
                place = self._place(run.first + number, channel)
                newest = T.bind(load(self.x, place))
                result = self._shift(channel) + newest * load(taps, self.past)
                for tap in range(self.past):
                    result = result + load(window, tap) * load(taps, tap)
                store(self.operands.out, place, result)
                for tap in range(self.past):
                    store(window, tap, load(window, tap + 1) if tap + 1 < self.past else newest)
            for tap in range(self.past):
                store(self.operands.state, self._state(run.row, i32(tap), channel), load(window, tap))

    def tokens(self) -> None:
        """Results of all tokens, a thread each and channel; states are only read."""
        operands, past = self.operands, self.past
        with launch((self.blocks, operands.tokens), THREADS) as ((block, token), thread):
            launch_next()
            row, position = load(operands.sequence, token), load(operands.position, token)
            before = self._own_before(token, row)
            channel = settled(block * i32(THREADS) + thread)
            wait_previous()
            with when(channel < i32(self.spec.channels)):
                last = load(self.weight, i32(past * self.spec.channels) + channel)
                total = registers(1)
                store(total, 0, self._shift(channel) + load(self.x, self._place(token, channel)) * last)
                for distance in range(1, past + 1):
                    tap = i32((past - distance) * self.spec.channels) + channel
                    with when(position >= i32(distance)):
                        value = self._earlier(token, row, channel, before, distance)
                        store(total, 0, load(total, 0) + value * load(self.weight, tap))
                store(operands.out, self._place(token, channel), load(total, 0))

    def keep(self, run: Run, block: Expr, thread: Expr) -> None:
        """The last inputs of a run, and of what was before it where the run is shorter."""
        channel = settled(block * i32(THREADS) + thread)
        with when(channel < i32(self.spec.channels)):
            window = registers(self.past)
            for tap in range(self.past):
                # Counted from the run's first token: below 0 it lies in the state.
                place = settled(run.end - run.first - i32(self.past - tap))
                store(window, tap, T.float32(0))
                with when(place >= i32(0)):
                    store(window, tap, load(self.x, self._place(run.first + place, channel)))
                with when(T.And(place < i32(0), run.position + place >= i32(0))):
                    held = self._state(run.row, place + i32(self.past), channel)
                    store(window, tap, load(self.operands.state, held))
            for tap in range(self.past):
                store(self.operands.state, self._state(run.row, i32(tap), channel), load(window, tap))

    def _own_before(self, token: Expr, row: Expr) -> Expr:
        """How many tokens right before one are of its sequence, up to ``past``."""
        count = registers(1, "int32")
        store(count, 0, i32(0))
        for distance in range(1, self.past + 1):
            earlier = load(self.operands.sequence, T.max(token - i32(distance), i32(0)))
            reached = T.And(token >= i32(distance), load(count, 0).equal(i32(distance - 1)))
            with when(T.And(reached, earlier.equal(row))):
                store(count, 0, i32(distance))
        return settled(load(count, 0))

    def _earlier(self, token: Expr, row: Expr, channel: Expr, before: Expr, distance: int) -> Buffer:
        """The input ``distance`` tokens earlier, from this step or from the state."""
        value = registers(1)
        with T.If(before >= i32(distance)):
            with T.Then():
                store(value, 0, load(self.x, self._place(token - i32(distance), channel)))
            with T.Else():
                place = self._state(row, i32(self.past - distance) + before, channel)
                store(value, 0, load(self.operands.state, place))
        return load(value, 0)

    def _shift(self, channel: Expr) -> Expr:
        return T.float32(0) if self.bias is None else load(self.bias, channel)

    def _place(self, token: Expr, channel: Expr) -> Expr:
        return T.bind(i64(token) * i64(self.spec.channels) + i64(channel))

    def _state(self, row: Expr, tap: Expr, channel: Expr) -> Expr:
        line = i64(row) * i64(self.past) + i64(tap)
        return T.bind(line * i64(self.spec.channels) + i64(channel))
