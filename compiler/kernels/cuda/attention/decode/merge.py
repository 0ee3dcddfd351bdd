"""From the warps' results to a block's, and from the blocks' to the token's."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.convert import floats
from moec.compiler.kernels.cuda.attention.decode.plan import THREADS, WARPS, Plan
from moec.compiler.kernels.cuda.attention.operands import LOG2E, LOWEST, Operands
from moec.compiler.kernels.cuda.primitives import (
    call,
    element,
    i32,
    registers,
    sync,
    value,
    warp_sum,
)
from moec.compiler.kernels.emit import Buffer, Expr, either, i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.kernels.cuda.attention.decode.softmax import Running


@dataclass(frozen=True)
class Output:
    """Whose results a block has."""

    token: Expr
    unit: Expr
    part: Expr
    active: Expr
    """Blocks that share the token's context."""
    row: Expr
    """Row of q and of the output (int64) of the block's first query head."""
    count: Expr
    """Its query heads."""


def _pitch(plan: Plan) -> int:
    """Floats from one row of sums to the next in shared memory."""
    return 64 * plan.value_steps + 4


def _facts(plan: Plan) -> int:
    """Where maxima and totals begin in shared memory, in floats."""
    return WARPS * plan.used * _pitch(plan)


def shared_bytes(plan: Plan) -> int:
    """Of a block: queries first, results afterwards."""
    queries = plan.key_steps * 2 * plan.halves * 32 * 16
    results = 4 * (_facts(plan) + 2 * plan.used * max(WARPS, plan.splits) + 4)
    return -(-max(queries, results) // 128) * 128


def finish(
    plan: Plan, operands: Operands, shared: Buffer, running: Running, output: Output, thread: Expr
) -> None:
    """Merge the block's warps and write the result, or leave it for the block that arrives last."""
    _put(plan, shared, running, thread)
    sync()
    warps = Parts(plan, shared, _facts(plan), WARPS, shared, i32(0), plan.used * _pitch(plan), _pitch(plan))

    def alone() -> None:
        with _items(plan, output.count, thread) as (row, place):
            _write(plan, operands, output, (row, place), *warps.merged(row, place, i32(WARPS)))

    def together() -> None:
        memory = _workspace(plan, operands, output)
        with _items(plan, output.count, thread) as (row, place):
            _leave(plan, memory, output, (row, place), *warps.merged(row, place, i32(WARPS)))
        with when(_arrived_last(plan, shared, output, thread)):
            blocks = _gather(plan, shared, memory, output, thread)
            with _items(plan, output.count, thread) as (row, place):
                _write(plan, operands, output, (row, place), *blocks.merged(row, place, output.active))

    either(output.active == i32(1), alone, together)


@dataclass(frozen=True)
class Parts:
    """Results of several warps or blocks, each with maximum and total of every row, and sums of values."""

    plan: Plan
    facts: Buffer
    start: int
    """Where the maxima begin, part by part; then, for ``most`` parts, the totals."""
    most: int
    sums: Buffer
    begin: Expr
    """Where the sums begin."""
    pitch: int
    """From one part's sums to the next."""
    row_pitch: int

    def merged(self, row: Expr, place: Expr, count: Expr) -> tuple[Expr, Expr, list[Expr]]:
        """Maximum, total and four sums of a row, always added in the same order."""
        largest, sums = registers(1), registers(5)
        store(largest, 0, T.float32(LOWEST))
        for number in range(5):
            store(sums, number, T.float32(0))
        with T.serial(i32(0), count) as part:
            store(largest, 0, T.max(load(largest, 0), load(self.facts, self._fact(part, row))))
        highest = T.bind(load(largest, 0))
        with T.serial(i32(0), count) as part:
            fact = T.bind(self._fact(part, row))
            weight = value("float32", "exp2", load(self.facts, fact) - highest)
            total = load(self.facts, fact + i32(self.most * self.plan.used))
            four = floats(self.sums, T.bind(self._sum(part, row, place)), 4)
            for number, found in enumerate([*four, total]):
                store(sums, number, load(sums, number) + weight * found)
        return highest, T.bind(load(sums, 4)), [T.bind(load(sums, number)) for number in range(4)]

    def _fact(self, part: Expr, row: Expr) -> Expr:
        return i32(self.start) + part * i32(self.plan.used) + row

    def _sum(self, part: Expr, row: Expr, place: Expr) -> Expr:
        inside = part * i32(self.pitch) + row * i32(self.row_pitch) + place
        return self.begin + (T.cast(inside, "int64") if str(self.begin.ty.dtype) == "int64" else inside)


@contextmanager
def _items(plan: Plan, rows: Expr, thread: Expr) -> Iterator[tuple[Expr, Expr]]:
    """For each thread its rows and places of four sums."""
    width = plan.spec.value_dim // 4
    count = T.bind(rows * i32(width))
    with T.serial(i32(0), (count - thread + i32(THREADS - 1)) // i32(THREADS)) as step:
        item = T.bind(thread + step * i32(THREADS))
        yield T.bind(item // i32(width)), T.bind(item % i32(width) * i32(4))


def _put(plan: Plan, shared: Buffer, running: Running, thread: Expr) -> None:
    """Write a warp's results into shared memory, where the queries were."""
    warp, lane = T.bind(thread // i32(32)), T.bind(thread % i32(32))
    group, part = T.bind(lane // i32(4)), T.bind(lane % i32(4))
    for half in range(plan.halves):
        row = T.bind(warp * i32(plan.used) + group + i32(8 * half))
        total = warp_sum(load(running.total, half), 4)
        with when(group + i32(8 * half) < i32(plan.used)):
            fact = T.bind(row + i32(_facts(plan)))
            store(shared, fact, load(running.highest, half))
            store(shared, fact + i32(WARPS * plan.used), total)
            for step in range(plan.value_steps):
                start = T.bind(row * i32(_pitch(plan)) + part * i32(16) + i32(64 * step))
                for column in range(2):
                    for fragment in range(0, 8, 4):
                        four = [
                            _sum_of(plan, running, 8 * step + fragment + number, column, half)
                            for number in range(4)
                        ]
                        _store_4(shared, start + i32(8 * column + fragment), four)


def _sum_of(plan: Plan, running: Running, fragment: int, column: int, half: int) -> Expr:
    first = load(running.sums, 4 * fragment + column + 2 * half)
    return first + load(running.sums, 4 * fragment + column + 2) if plan.halves == 1 else first


def _store_4(buffer: Buffer, place: Expr, values: list[Expr]) -> None:
    words = [T.bind(T.reinterpret("uint32", T.bind(number))) for number in values]
    call("store_16", element(buffer, place), *words)


def _write(
    plan: Plan,
    operands: Operands,
    output: Output,
    item: tuple[Expr, Expr],
    highest: Expr,
    total: Expr,
    sums: list[Expr],
) -> None:
    """Divide by the total, to which the sink is added, and write to the output."""
    row, place = item
    scale = registers(1)
    store(scale, 0, T.float32(1) / total)
    if operands.sinks is not None:
        head = output.unit // i32(plan.tiles) * i32(plan.group) + output.unit % i32(plan.tiles) * i32(
            plan.rows
        )
        sink = T.bind(load(operands.sinks, head + row) * T.float32(LOG2E))
        largest = T.bind(T.max(highest, sink))
        own = value("float32", "exp2", highest - largest)
        store(scale, 0, own / (total * own + value("float32", "exp2", sink - largest)))
    target = (output.row + T.cast(row, "int64")) * i64(plan.spec.value_dim) + T.cast(place, "int64")
    _store_4(operands.out, T.bind(target), [number * load(scale, 0) for number in sums])


def _workspace(plan: Plan, operands: Operands, output: Output) -> tuple[Buffer, Expr]:
    """The workspace as float32, and where the unit's first block leaves its results."""
    assert operands.workspace is not None
    memory = T.decl_buffer((i64(plan.workspace_bytes // 4),), "float32", data=operands.workspace.data)
    unit = T.bind(T.cast(output.token * i32(plan.units) + output.unit, "int64"))
    return memory, T.bind(unit * i64(plan.splits * plan.partial_floats))


def _leave(
    plan: Plan,
    memory: tuple[Buffer, Expr],
    output: Output,
    item: tuple[Expr, Expr],
    highest: Expr,
    total: Expr,
    sums: list[Expr],
) -> None:
    buffer, begin = memory
    row, place = item
    start = T.bind(begin + T.cast(output.part * i32(plan.partial_floats), "int64"))
    inside = T.cast(row * i32(plan.spec.value_dim) + place, "int64")
    _store_4(buffer, T.bind(start + inside), sums)
    with when(place == i32(0)):
        fact = T.bind(start + T.cast(row + i32(plan.used * plan.spec.value_dim), "int64"))
        store(buffer, fact, highest)
        store(buffer, fact + i64(plan.used), total)


def _arrived_last(plan: Plan, shared: Buffer, output: Output, thread: Expr) -> Expr:
    """Whether all other blocks of the unit have left their results."""
    flag = shared_bytes(plan) // 4 - 1
    sync()
    with when(thread == i32(0)):
        counter = T.bind(output.token * i32(plan.units) + output.unit)
        last = value("bool", "arrives_last", counter, output.active)
        store(shared, flag, T.cast(last, "float32"))
    sync()
    return T.bind(load(shared, flag) != T.float32(0))


def _gather(plan: Plan, shared: Buffer, memory: tuple[Buffer, Expr], output: Output, thread: Expr) -> Parts:
    """Maxima and totals of all blocks into shared memory."""
    buffer, begin = memory
    count = T.bind(output.active * i32(2 * plan.used))
    with T.serial(i32(0), (count - thread + i32(THREADS - 1)) // i32(THREADS)) as step:
        item = T.bind(thread + step * i32(THREADS))
        part, fact = T.bind(item // i32(2 * plan.used)), T.bind(item % i32(2 * plan.used))
        place = part * i32(plan.partial_floats) + i32(plan.used * plan.spec.value_dim) + fact
        kind, row = fact // i32(plan.used), fact % i32(plan.used)
        target = kind * i32(plan.splits * plan.used) + part * i32(plan.used) + row
        store(shared, i32(_facts(plan)) + target, load(buffer, begin + T.cast(place, "int64")))
    sync()
    return Parts(
        plan, shared, _facts(plan), plan.splits, buffer, begin, plan.partial_floats, plan.spec.value_dim
    )
