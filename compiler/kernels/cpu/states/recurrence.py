"""A linear recurrence over a matrix for each head: threads take columns, and go through the step's tokens in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.math import VectorMath
from moec.compiler.kernels.cpu.states.columns import Columns, begin, divide
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    div,
    i64,
    keep,
    load,
    loop,
    mod,
    registers,
    splat,
    store,
)

if TYPE_CHECKING:
    from moec.artifacts.states import RecurrenceSpec
    from moec.compiler.kernels.cpu.machine import Machine
    from moec.compiler.kernels.cpu.states.operands import StateOperands

VECTORS = 2
"""Of a block: its columns stay in the first-level cache from one token to the next."""
PARALLEL_ELEMENTS = 1 << 14
"""States up to this size are not worth waking other threads for."""


def recurrence(spec: RecurrenceSpec, machine: Machine, operands: StateOperands) -> None:
    """Emit the kernel."""
    _Recurrence(spec, divide(spec.value_dim, machine, VECTORS), operands).emit()


@dataclass(frozen=True)
class _Token:
    """One token of a task: its number, and where its head's numbers begin (elements)."""

    number: Expr
    head: Expr
    key: Expr
    """Of query and key."""
    column: Expr
    """Within a head."""
    value: Expr
    """Of value and result, at the column."""
    state: Expr
    """Of the state's first row, at the column."""


class _Recurrence:
    """The parts of one kernel while it is emitted."""

    def __init__(self, spec: RecurrenceSpec, columns: Columns, operands: StateOperands) -> None:
        self.spec, self.columns, self.operands = spec, columns, operands
        self.query, self.key, self.value, *rest = operands.inputs
        self.beta = rest.pop() if spec.delta else None
        self.decay = rest[0] if rest else None
        self.rates = operands.weights[0] if operands.weights else None

    def emit(self) -> None:
        spec, columns = self.spec, self.columns
        size = spec.value_heads * spec.key_dim * spec.value_dim
        with loop(spec.value_heads * columns.blocks, parallel=size > PARALLEL_ELEMENTS) as task:
            head = keep(div(task, columns.blocks))
            column = keep(mod(task, columns.blocks) * i64(columns.width))
            sums = registers(columns.width)
            with loop(self.operands.tokens) as number:
                self._token(self._locate(number, head, column), sums)

    def _locate(self, number: Expr, head: Expr, column: Expr) -> _Token:
        spec = self.spec
        heads, rows, width = i64(spec.value_heads), i64(spec.key_dim), i64(spec.value_dim)
        own = keep(number * heads + head)
        key_head = number * i64(spec.key_heads) + div(head, spec.value_heads // spec.key_heads)
        sequence = T.cast(load(self.operands.sequence, number), "int64")
        return _Token(
            number,
            head,
            keep(key_head * rows),
            column,
            keep(own * width + column),
            keep((sequence * heads + head) * rows * width + column),
        )

    def _token(self, token: _Token, sums: Buffer) -> None:
        """Decay and, for the delta rule, ask the state for the key; then write, and ask it for the query."""
        lanes, state = self.columns.lanes, self.operands.state
        position = keep(T.cast(load(self.operands.position, token.number), "int64"))
        factor = self._common_factor(token)
        self._clear(sums)
        with loop(self.spec.key_dim) as row:
            places = self._places(token, row)
            begin(position, state, places, lanes)
            known = splat(keep(load(self.key, token.key + row)), lanes)
            for number, place in enumerate(places):
                held = load(state, place, lanes) * self._factor(token, row, number, factor)
                store(state, place, held, lanes)
                if self.spec.delta:
                    at = number * lanes
                    store(sums, at, load(sums, at, lanes) + known * load(state, place, lanes), lanes)
        written = [self._written(token, sums, number) for number in range(self.columns.vectors)]
        self._clear(sums)
        with loop(self.spec.key_dim) as row:
            known = splat(keep(load(self.key, token.key + row)), lanes)
            asked = splat(keep(load(self.query, token.key + row)), lanes)
            for number, place in enumerate(self._places(token, row)):
                held = keep(load(state, place, lanes) + known * written[number])
                store(state, place, held, lanes)
                at = number * lanes
                store(sums, at, load(sums, at, lanes) + asked * held, lanes)
        for number in range(self.columns.vectors):
            at = number * lanes
            store(self.operands.out, token.value + i64(at), load(sums, at, lanes), lanes)

    def _clear(self, sums: Buffer) -> None:
        for number in range(self.columns.vectors):
            store(sums, number * self.columns.lanes, splat(0.0, self.columns.lanes), self.columns.lanes)

    def _places(self, token: _Token, row: Expr) -> list[Expr]:
        start = keep(token.state + row * i64(self.spec.value_dim))
        return [keep(start + i64(number * self.columns.lanes)) for number in range(self.columns.vectors)]

    def _common_factor(self, token: _Token) -> Expr | None:
        """What all of a head decays by, where that is one number."""
        if self.spec.decay == "head":
            own = token.number * i64(self.spec.value_heads) + token.head
            return VectorMath(1).exp(load(self.decay, own))
        if self.spec.decay == "fixed":
            return VectorMath(1).exp(load(self.rates, token.head))
        return None

    def _factor(self, token: _Token, row: Expr, number: int, common: Expr | None) -> Expr:
        """What one vector of a row decays by."""
        spec, lanes = self.spec, self.columns.lanes
        if common is not None:
            return splat(common, lanes)
        if spec.decay == "channel":
            own = token.number * i64(spec.value_heads) + token.head
            return splat(VectorMath(1).exp(load(self.decay, own * i64(spec.key_dim) + row)), lanes)
        at = i64(number * lanes)
        line = (token.head * i64(spec.key_dim) + row) * i64(spec.value_dim) + token.column
        steps = load(self.decay, token.value + at, lanes)
        return VectorMath(lanes).exp(steps * load(self.rates, line + at, lanes))

    def _written(self, token: _Token, sums: Buffer, number: int) -> Expr:
        """What is added to the state under the key."""
        lanes, at = self.columns.lanes, number * self.columns.lanes
        value = load(self.value, token.value + i64(at), lanes)
        if self.beta is None:
            return keep(value)
        own = token.number * i64(self.spec.value_heads) + token.head
        return keep(splat(keep(load(self.beta, own)), lanes) * (value - load(sums, at, lanes)))
