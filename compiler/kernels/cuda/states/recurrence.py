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
from moec.compiler.kernels.cuda.primitives import LANES, i32, registers, shared, sync, value, warp_sum
from moec.compiler.kernels.cuda.states.runs import Run, runs_of_few_tokens, runs_of_rows
from moec.compiler.kernels.cuda.states.sums import FOUR, WarpSums, four
from moec.compiler.kernels.emit import Buffer, Expr, either, i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.states import RecurrenceSpec
    from moec.compiler.kernels.cpu.states.operands import StateOperands

MOST_WARPS = 8
FEWEST_ROWS = 4
"""Of a warp, where it shares the rows with others."""
STAGED = 8192
"""Numbers of keys, queries and decays of rows in shared memory, at most, unless one token has more."""
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


@dataclass(frozen=True)
class _Stage:
    """Shared memory for what some tokens bring, token after token."""

    query: Buffer
    key: Buffer
    product: Buffer
    """``k . q``."""
    value: Buffer
    factor: Buffer | None
    """What the state decays by: a number a token, or one for each row; or steps, for each column."""
    beta: Buffer | None


@dataclass(frozen=True)
class _Piece:
    """Part of what tokens bring: ``width`` numbers each, and where one of a token's is read."""

    target: Buffer
    width: int
    read: Callable[[Expr, Expr], Expr]
    exponential: bool = False
    """Stage ``exp`` of it."""


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
        per_token = spec.key_dim * (3 if spec.decay == "channel" else 2)
        self.staged = max(1, min(most_staged, STAGED // per_token))
        self.query, self.key, self.value, *rest = operands.inputs
        self.beta = rest.pop() if spec.delta else None
        self.decay = rest[0] if rest else None

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
        stage, sums = self._stage(), WarpSums(self.warps, 2 if self.spec.delta else 1)
        with T.serial(i32(0), (run.end - run.first + i32(self.staged - 1)) // i32(self.staged)) as turn:
            begin = settled(run.first + turn * i32(self.staged))
            count = settled(T.min(i32(self.staged), run.end - begin))
            with when(turn > i32(0)):
                sync()
            self._bring(place, stage, begin, count)
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
        stage: _Stage,
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

    def _products(self, place: _Place, stage: _Stage, count: Expr) -> None:
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

    def _factor(self, stage: _Stage, common: Expr, column: Expr, row: int, rates: Buffer | None) -> Expr:
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

    def _stage(self) -> _Stage:
        spec, rows = self.spec, self.staged * self.spec.key_dim
        sizes = {"head": self.staged, "channel": rows, "rates": self.staged * LANES}
        return _Stage(
            shared(rows),
            shared(rows),
            shared(self.staged),
            shared(self.staged * LANES),
            None if spec.decay == "fixed" else shared(sizes[spec.decay]),
            shared(self.staged) if spec.delta else None,
        )

    def _bring(self, place: _Place, stage: _Stage, begin: Expr, count: Expr) -> None:
        """Stage what ``count`` tokens from ``begin`` on bring."""
        spec, head, heads = self.spec, place.head, self.spec.value_heads
        key_head = settled(T.truncdiv(head, i32(heads // spec.key_heads)))

        def rows(source: Buffer, own: Expr, of: int) -> Callable[[Expr, Expr], Expr]:
            def read(token: Expr, row: Expr) -> Expr:
                line = i64(begin + token) * i64(of) + i64(own)
                return load(source, line * i64(spec.key_dim) + i64(row))

            return read

        def columns(source: Buffer) -> Callable[[Expr, Expr], Expr]:
            def read(token: Expr, lane: Expr) -> Expr:
                column = T.min(place.first_column + lane, i32(spec.value_dim - 1))
                line = i64(begin + token) * i64(heads) + i64(head)
                return load(source, line * i64(spec.value_dim) + i64(column))

            return read

        def alone(source: Buffer) -> Callable[[Expr, Expr], Expr]:
            return lambda token, _: load(source, (begin + token) * i32(heads) + head)

        pieces = [
            _Piece(stage.query, spec.key_dim, rows(self.query, key_head, spec.key_heads)),
            _Piece(stage.key, spec.key_dim, rows(self.key, key_head, spec.key_heads)),
            _Piece(stage.value, LANES, columns(self.value)),
        ]
        if spec.decay == "head":
            pieces.append(_Piece(stage.factor, 1, alone(self.decay), exponential=True))
        elif spec.decay == "channel":
            pieces.append(_Piece(stage.factor, spec.key_dim, rows(self.decay, head, heads), exponential=True))
        elif spec.decay == "rates":
            pieces.append(_Piece(stage.factor, LANES, columns(self.decay)))
        if stage.beta is not None:
            pieces.append(_Piece(stage.beta, 1, alone(self.beta)))
        self._copy(place, pieces, count)

    def _copy(self, place: _Place, pieces: list[_Piece], count: Expr) -> None:
        """``target[token, i] = read(token, i)`` for ``count`` tokens, by all threads: asked for first, then stored."""
        threads = LANES * self.warps
        asked: list[tuple[_Piece, Expr, Expr, Buffer]] = []
        for piece in pieces:
            for turn in range(-(-self.staged * piece.width // threads)):
                number = settled(i32(turn * threads) + place.thread)
                there = T.bind(number < count * i32(piece.width))
                held = registers(1)
                with when(there):
                    token = settled(T.truncdiv(number, i32(piece.width)))
                    store(held, 0, piece.read(token, settled(T.truncmod(number, i32(piece.width)))))
                asked.append((piece, number, there, held))
        for piece, number, there, held in asked:
            with when(there):
                found = load(held, 0)
                store(piece.target, number, value("float32", "exp", found) if piece.exponential else found)

    def _state(self, place: _Place) -> Expr:
        """Where the thread's first number of the state lies."""
        spec = self.spec
        head = i64(place.run.row) * i64(spec.value_heads) + i64(place.head)
        row = head * i64(spec.key_dim) + i64(place.warp) * i64(self.rows)
        return T.bind(row * i64(spec.value_dim) + i64(place.column))

    def _out(self, place: _Place, token: Expr) -> Expr:
        line = i64(token) * i64(self.spec.value_heads) + i64(place.head)
        return T.bind(line * i64(self.spec.value_dim) + i64(place.column))
