"""The routed experts of a layer in one call: group the tokens by expert, read each chosen expert once.

Two phases, each over all threads: ``activation(gate x, up x)`` of every (token, choice) pair, grouped by expert;
``down`` of it, weighted and summed over a token's choices in their order.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.expert_parts import Cover, ExpertParts, ExpertTensors, Group, Source, writer
from moec.compiler.kernels.cpu.grouping import Groups, group_by_expert
from moec.compiler.kernels.cpu.machine import Machine
from moec.compiler.kernels.cpu.many.experts import ManyExperts
from moec.compiler.kernels.cpu.many.tiles import depth_of
from moec.compiler.kernels.cpu.pairs.experts import PairExperts
from moec.compiler.kernels.cpu.tiling import STREAM_COLUMNS, tiles
from moec.compiler.kernels.cpu.weights import STREAM_ROWS
from moec.compiler.kernels.emit import (
    Argument,
    Buffer,
    Expr,
    arguments,
    build,
    ceildiv,
    div,
    either,
    i64,
    keep,
    load,
    loop,
    mod,
    scope,
    scratch,
    store,
    symbol,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tvm import tirx

    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cpu.pair_products import PairProducts
    from moec.compiler.kernels.cpu.rounding import Rounded

TASK_ROWS = 48
"""Rows of an expert's matrix that a thread takes at a time, about: enough to use an activation from the cache."""
TILE_PAIRS = 64
"""Pairs of one expert whose activations a thread keeps in its second-level cache."""


def experts(
    body: ExpertBody, *, lanes: int, pairs: PairProducts | None = None, name: str | None = None
) -> tirx.PrimFunc:
    """The kernel ``experts_<body>(x [T, H], index [T, K], weight [T, K], table [E], out [T, H])``.

    Args:
        body: one expert's shape; its bytes are laid out as ``artifacts.layout.experts`` says. ``index`` and ``table``
            (addresses) are int64, all else is float32.
        lanes: float32 lanes of the target's vectors (16, 8 or 4).
        pairs: the target's instruction for pairs of bfloat16, if any.
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
        call = ExpertTensors(x, index, weight, table, out, tokens, chosen, count)
        machine = Machine(lanes, pairs)
        with nullcontext() if pairs is None else pairs.defined():
            _Experts(body, machine, call).emit()

    return build(name or f"experts_{body.name}", emit)


class _Experts:
    """One kernel while it is emitted."""

    def __init__(self, body: ExpertBody, machine: Machine, call: ExpertTensors) -> None:
        self.body, self.machine, self.call = body, machine, call
        self.parts = ExpertParts(body, machine)
        name = body.format or body.dtype
        wide, narrow = (depth_of(name, columns, machine) for columns in (body.hidden, body.intermediate))
        self.depths = None if wide is None or narrow is None else (wide, narrow)
        self.paired = machine.pairs is not None and name == "bfloat16"
        self.apart = self.depths is not None or self.paired
        """Whether experts with many pairs go another way than those with few."""

    def emit(self) -> None:
        call = self.call
        pairs = keep(call.tokens * call.chosen)
        groups = group_by_expert(call.index, pairs, call.experts, self._few())
        middle = scratch(groups.few_pairs * i64(self.body.intermediate))
        many = self._many(groups, pairs)
        self._gate_up(groups, middle, many)
        self._down(groups, middle, many, pairs)

    def _few(self) -> Expr | None:
        """Pairs up to which an expert has few; None: always."""
        if self.paired:
            # All experts of a step are computed alike: a token's result does not depend on what others choose.
            return keep(
                T.Select(self.call.tokens > i64(STREAM_COLUMNS), i64(0), self.call.tokens * self.call.chosen)
            )
        return i64(STREAM_COLUMNS) if self.depths is not None else None

    def _many(self, groups: Groups, pairs: Expr) -> ManyExperts | PairExperts | None:
        """What computes the experts with many pairs, if that is not done row by row too."""
        if self.depths is not None:
            return ManyExperts(self.parts, self.depths, self.call, groups, pairs)
        return PairExperts(self.parts, self.call, groups) if self.paired else None

    def _gate_up(self, groups: Groups, middle: Buffer, many: ManyExperts | PairExperts | None) -> None:
        """``middle[place, i] = activation(gate, up)``, places in order of the experts."""
        tasks, rows = _even(self.body.intermediate)
        few = keep(T.Select(groups.few > i64(0), self.call.tokens, i64(0)))
        rounded = self.parts.round_vectors(self.body.hidden, self.call.x, few, together=True)
        if many is not None:
            many.gather()
        with loop(i64(tasks) * groups.active, parallel=True) as task:
            # Few tokens: an expert's rows one after the other, so that what is asked for ahead is read next.
            alike = self.call.tokens <= i64(STREAM_COLUMNS)
            expert = keep(T.Select(alike, div(task, tasks), mod(task, groups.active)))
            part = keep(T.Select(alike, mod(task, tasks), div(task, groups.active)))
            first = keep(T.min(part * i64(rows), i64(self.body.intermediate - rows)))

            def by_rows() -> None:
                with scope():
                    self._gate_up_rows(groups, middle, rounded, expert, first, rows)

            if many is None:
                by_rows()
            else:
                tiled = partial(many.gate_up, expert, first, rows)
                either(expert < groups.few, by_rows, tiled)

    def _gate_up_rows(
        self, groups: Groups, middle: Buffer, rounded: Rounded | None, expert: Expr, first: Expr, rows: int
    ) -> None:
        """Of one expert, row by row of its matrices."""
        stride = -(-rows // self.machine.lanes) * self.machine.lanes
        buffers = {
            part: scratch(TILE_PAIRS * stride) for part in (("gate", "up") if self.body.gated else ("up",))
        }

        def tile(group: Group) -> None:
            source = Source(self.call.x, lambda place: div(groups.pair(place), self.call.chosen), rounded)
            for part, target in buffers.items():
                write = writer(target, stride, lambda place: place - group.start)
                self.parts.product({part: write}, group, first, source, self._cover(rows))
            self.parts.activate(buffers, stride, group.count)
            with loop(group.count) as column:
                place = (group.start + column) * i64(self.body.intermediate) + first
                _copy(buffers["up"], column * i64(stride), middle, place, rows, self.machine.lanes)

        self._tiles(groups, expert, tile)

    def _down(
        self, groups: Groups, middle: Buffer, many: ManyExperts | PairExperts | None, pairs: Expr
    ) -> None:
        """``out[t] = sum_k weight[t, k] * down(middle[t, k])``, summed over k in order."""
        tasks, rows = _even(self.body.hidden)
        rounded = self.parts.round_vectors(self.body.intermediate, middle, groups.few_pairs, together=True)
        if many is not None:
            many.round_middle()
        with loop(tasks, parallel=True) as task:
            first = keep(T.min(task * i64(rows), i64(self.body.hidden - rows)))
            results = scratch(pairs * i64(rows))

            def tile(group: Group) -> None:
                source = Source(middle, lambda place: place, rounded)
                write = writer(results, rows, groups.pair)
                self.parts.product({"down": write}, group, first, source, self._cover(rows))

            with loop(groups.few) as number:
                self._tiles(groups, number, tile)
            if many is not None:
                with loop(groups.active - groups.few) as number:
                    many.down(keep(number + groups.few), first, rows, results)
            with loop(self.call.tokens) as token:
                self.parts.combine(self.call, token, results, rows, first, rows)

    def _cover(self, rows: int) -> Cover:
        streamed = min(STREAM_ROWS, rows)
        return Cover(
            lambda columns, open_rows: tiles(
                rows, columns, self.machine, open_rows, stream_rows=streamed, many=not self.apart
            ),
            stream_rows=streamed,
            block_rows=min(self.machine.rows, rows) if not self.apart else 0,
        )

    def _tiles(self, groups: Groups, number: Expr, emit: Callable[[Group], None]) -> None:
        """Call ``emit`` for the pairs of an active expert, so many at a time as a cache holds."""
        address = keep(load(self.call.table, groups.expert(number)))
        start, size = keep(groups.start(number)), keep(groups.size(number))
        with loop(ceildiv(size, TILE_PAIRS)) as tile:
            done = keep(tile * i64(TILE_PAIRS))
            emit(Group(address, keep(start + done), keep(T.min(i64(TILE_PAIRS), size - done))))


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
