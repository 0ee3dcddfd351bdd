"""The routed experts of a layer in one call: group the tokens by expert, read each chosen expert once.

Two phases, each over all threads: ``activation(gate x, up x)`` of every (token, choice) pair, grouped by expert;
``down`` of it, weighted and summed over a token's choices in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.experts import layout
from moec.compiler.kernels import activation
from moec.compiler.kernels.cpu.dot import Columns, Rows, dot, tiles
from moec.compiler.kernels.cpu.emit import (
    Argument,
    Buffer,
    Expr,
    arguments,
    at_address,
    build,
    ceildiv,
    div,
    i64,
    keep,
    load,
    loop,
    mod,
    registers,
    scratch,
    splat,
    store,
    symbol,
    when,
)
from moec.compiler.kernels.cpu.grouping import Groups, group_by_expert, is_expert
from moec.compiler.kernels.cpu.machine import Machine
from moec.compiler.kernels.cpu.math import VectorMath
from moec.compiler.kernels.cpu.numeric import widen

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import ExpertBody

TASK_ROWS = 48
"""Rows of an expert's matrix that a thread takes at a time, about: enough to use an activation from the cache."""
TILE_PAIRS = 64
"""Pairs of one expert whose activations a thread keeps in its second-level cache."""


def experts(body: ExpertBody, *, lanes: int, name: str | None = None) -> tirx.PrimFunc:
    """The kernel ``experts_<body>(x [T, H], index [T, K], weight [T, K], table [E], out [T, H])``.

    Args:
        body: one expert's shape; its bytes are laid out as ``artifacts.experts.layout`` says. ``index`` and ``table``
            (addresses) are int64, all else is float32.
        lanes: float32 lanes of the target's vectors (16, 8 or 4).
        name: the function's name; ``experts_<body.name>`` by default.

    An index outside ``0 .. E-1`` contributes nothing. T, K and E are symbolic.
    """

    def emit() -> None:
        tokens, chosen, count = symbol("T"), symbol("K"), symbol("E")
        x, index, weight, table, out = arguments(
            Argument("x", (tokens, body.hidden), "float32"),
            Argument("index", (tokens, chosen), "int64"),
            Argument("weight", (tokens, chosen), "float32"),
            Argument("table", (count,), "int64"),
            Argument("out", (tokens, body.hidden), "float32"),
        )
        call = _Call(x, index, weight, table, out, tokens, chosen, count)
        _Experts(body, Machine(lanes), call).emit()

    return build(name or f"experts_{body.name}", emit)


@dataclass(frozen=True)
class _Call:
    x: Buffer
    index: Buffer
    weight: Buffer
    table: Buffer
    out: Buffer
    tokens: Expr
    chosen: Expr
    experts: Expr


@dataclass(frozen=True)
class _Group:
    """Some pairs of one expert, as a task sees them: places ``start .. start+count-1`` of the order."""

    address: Expr
    start: Expr
    count: Expr


class _Experts:
    """The parts of one kernel while it is emitted."""

    def __init__(self, body: ExpertBody, machine: Machine, call: _Call) -> None:
        self.body, self.machine, self.call = body, machine, call
        self.layout = layout(body)

    def emit(self) -> None:
        call = self.call
        pairs = keep(call.tokens * call.chosen)
        groups = group_by_expert(call.index, pairs, call.experts)
        middle = scratch(pairs * i64(self.body.intermediate))
        self._gate_up(groups, middle)
        self._down(groups, middle, pairs)

    def _gate_up(self, groups: Groups, middle: Buffer) -> None:
        """``middle[place, i] = activation(gate, up)``, places in order of the experts."""
        tasks, rows = _even(self.body.intermediate)
        stride = -(-rows // self.machine.lanes) * self.machine.lanes
        with loop(i64(tasks) * groups.active, parallel=True) as task:
            first = keep(T.min(div(task, groups.active) * i64(rows), i64(self.body.intermediate - rows)))
            buffers = {
                part: scratch(TILE_PAIRS * stride)
                for part in (("gate", "up") if self.body.gated else ("up",))
            }

            def tile(group: _Group) -> None:
                for part, target in buffers.items():
                    source = _Source(self.call.x, lambda place: div(groups.pair(place), self.call.chosen))
                    self._product(
                        part,
                        group,
                        first,
                        rows,
                        source,
                        _writer(target, stride, lambda place: place - group.start),
                    )
                self._activate(buffers, stride, group.count)
                with loop(group.count) as column:
                    place = (group.start + column) * i64(self.body.intermediate) + first
                    _copy(buffers["up"], column * i64(stride), middle, place, rows, self.machine.lanes)

            self._tiles(groups, keep(mod(task, groups.active)), tile)

    def _down(self, groups: Groups, middle: Buffer, pairs: Expr) -> None:
        """``out[t] = sum_k weight[t, k] * down(middle[t, k])``, summed over k in order."""
        tasks, rows = _even(self.body.hidden)
        with loop(tasks, parallel=True) as task:
            first = keep(T.min(task * i64(rows), i64(self.body.hidden - rows)))
            results = scratch(pairs * i64(rows))

            def tile(group: _Group) -> None:
                source = _Source(middle, lambda place: place)
                self._product("down", group, first, rows, source, _writer(results, rows, groups.pair))

            with loop(groups.active) as number:
                self._tiles(groups, number, tile)
            with loop(self.call.tokens) as token:
                self._combine(token, results, first, rows)

    def _tiles(self, groups: Groups, number: Expr, emit: Callable[[_Group], None]) -> None:
        """Call ``emit`` for the pairs of an active expert, so many at a time as a cache holds."""
        address = keep(load(self.call.table, groups.expert(number)))
        start, size = keep(groups.start(number)), keep(groups.size(number))
        with loop(ceildiv(size, TILE_PAIRS)) as tile:
            done = keep(tile * i64(TILE_PAIRS))
            emit(_Group(address, keep(start + done), keep(T.min(i64(TILE_PAIRS), size - done))))

    def _product(
        self, part: str, group: _Group, first: Expr, rows: int, source: _Source, write: _Writer
    ) -> None:
        """Rows ``first .. first+rows-1`` of ``part`` times the group's vectors, plus the part's bias."""
        shape = self.layout.part(part)
        total, depth = shape.shape
        dtype = self.body.dtype
        weights = at_address(group.address + i64(shape.offset_bytes), total * depth, dtype)
        bias = self._bias(part, group)

        def tile(numbers: list[Expr], columns: list[Expr]) -> None:
            places = [keep(group.start + column) for column in columns]
            matrix = Rows(weights, dtype, [keep((first + number) * i64(depth)) for number in numbers])
            vectors = Columns(source.buffer, [keep(source.row(place) * i64(depth)) for place in places])
            sums = dot(matrix, vectors, depth, self.machine)
            for number, row_sums in zip(numbers, sums, strict=True):
                shift = bias(first + number)
                for place, value in zip(places, row_sums, strict=True):
                    write(number, place, value if shift is None else value + shift)

        tiles(rows, group.count, self.machine, tile)

    def _bias(self, part: str, group: _Group) -> Callable[[Expr], Expr | None]:
        if not (self.body.down_bias if part == "down" else self.body.up_bias):
            return lambda row: None  # noqa: ARG005
        place = self.layout.part(f"{part}_bias")
        buffer = at_address(group.address + i64(place.offset_bytes), place.shape[0], self.body.dtype)
        native = self.machine.native_f16
        return lambda row: keep(widen(buffer, self.body.dtype, row, 1, native_f16=native))

    def _activate(self, buffers: dict[str, Buffer], stride: int, count: Expr) -> None:
        """``up = activation(gate, up)`` in place, in whole vectors; lanes beyond the rows are never used."""
        lanes = self.machine.lanes
        math = VectorMath(lanes)
        with loop(count * i64(stride // lanes)) as step:
            place = step * i64(lanes)
            variables = {part: keep(load(buffer, place, lanes)) for part, buffer in buffers.items()}
            value = activation.emit(self.body.activation, variables, math.operators(), math.constant)
            store(buffers["up"], place, value, lanes)

    def _combine(self, token: Expr, results: Buffer, first: Expr, rows: int) -> None:
        """The weighted sum over one token's choices, for a task's rows."""
        lanes = self.machine.lanes
        with loop(rows // lanes) as step:
            self._combine_vector(token, results, first, rows, step * i64(lanes), lanes)
        with loop(rows % lanes) as step:
            self._combine_vector(token, results, first, rows, step + i64(rows - rows % lanes), 1)

    def _combine_vector(
        self, token: Expr, results: Buffer, first: Expr, rows: int, row: Expr, lanes: int
    ) -> None:
        call = self.call
        total = registers(lanes)
        store(total, 0, splat(0.0, lanes), lanes)
        with loop(call.chosen) as choice:
            pair = keep(token * call.chosen + choice)
            with when(is_expert(load(call.index, pair), call.experts)):
                weight = keep(load(call.weight, pair))
                value = load(results, pair * i64(rows) + row, lanes)
                store(total, 0, load(total, 0, lanes) + splat(weight, lanes) * value, lanes)
        place = token * i64(self.body.hidden) + first + row
        store(call.out, place, load(total, 0, lanes), lanes)


@dataclass(frozen=True)
class _Source:
    """Float32 vectors, and which of them belongs to a place of the order."""

    buffer: Buffer
    row: Callable[[Expr], Expr]


_Writer = Callable[[Expr, Expr, Expr], None]
"""Takes a row number within the task, a place of the order, and the value."""


def _writer(target: Buffer, stride: int, row: Callable[[Expr], Expr]) -> _Writer:
    def write(number: Expr, place: Expr, value: Expr) -> None:
        store(target, row(place) * i64(stride) + number, value)

    return write


def _even(total: int) -> tuple[int, int]:
    """Tasks, and rows of each; the last task moves up so as to stay inside."""
    tasks = -(-total // TASK_ROWS)
    return tasks, -(-total // tasks)


def _copy(source: Buffer, start: Expr, target: Buffer, place: Expr, size: int, lanes: int) -> None:
    with loop(size // lanes) as step:
        store(target, place + step * i64(lanes), load(source, start + step * i64(lanes), lanes), lanes)
    with loop(size % lanes) as step:
        rest = step + i64(size - size % lanes)
        store(target, place + rest, load(source, start + rest))
