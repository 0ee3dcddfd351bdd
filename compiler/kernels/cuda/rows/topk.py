"""The K largest entries of each row of a region, in falling order, ties by rising index, by the threads of one block.

An entry's place among the results is how many come before it. Where rows are short every thread counts that for entries
of its own, and no thread waits for another: of 64 entries in a fifth of the time that K rounds take in which a warp
finds the largest that is left. Longer rows take those rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as gpu
from moec.compiler.kernels.cuda.few.lanes import quotient, remainder
from moec.compiler.kernels.cuda.primitives import LANES, i32
from moec.compiler.kernels.emit import load, loop, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.emit import Buffer, Expr

MOST_COMPARED = 1024
"""Entries that a thread looks at to count; with more, rounds take less time."""
MOST_COUNTED = 512
"""Entries of all rows that are kept in shared memory to be counted."""
LOWEST = -3.4028234663852886e38
NOWHERE = 1 << 30
"""An index larger than any."""


@dataclass(frozen=True)
class RowTopK:
    """What is looked for."""

    rows: int
    entries: int
    count: int
    """K."""
    read: Callable[[Expr], Expr]
    """The float32 at ``row * entries + entry`` (int32)."""
    keep: Callable[[Expr, Expr, Expr], None]
    """``(row * count + number, value, entry)`` of a result; int32, float32, int32."""

    def counts(self, threads: int) -> bool:
        """Whether entries are put in their places by counting."""
        total = self.rows * self.entries
        return total <= MOST_COUNTED and self.entries * -(-total // threads) <= MOST_COMPARED


def emit_topk(work: RowTopK, thread: Expr, threads: int) -> None:
    """Emit the search; all threads of a block take part, and what they read must be there."""
    (_by_counting if work.counts(threads) else _by_rounds)(work, thread, threads)


def _by_counting(work: RowTopK, thread: Expr, threads: int) -> None:
    total = work.rows * work.entries
    ranks, values = gpu.shared(total, "int32"), gpu.shared(total)

    def each(emit: Callable[[Expr], None]) -> None:
        for first in range(0, total, threads):
            place = T.bind(thread + i32(first))
            if first + threads <= total:
                emit(place)
            else:
                with when(place < i32(total)):
                    emit(place)

    def read(place: Expr) -> None:
        value = T.bind(work.read(place))
        store(values, place, value)
        store(ranks, place, _ordered(value))

    def put(place: Expr) -> None:
        row, entry = T.bind(quotient(place, work.entries)), T.bind(remainder(place, work.entries))
        own, begin = T.bind(load(ranks, place)), T.bind(row * i32(work.entries))
        before = gpu.registers(1, "int32")
        store(before, 0, i32(0))
        with loop(work.entries) as step:
            other = T.bind(load(ranks, begin + i32(step)))
            comes = (other > own) | ((other == own) & (i32(step) < entry))
            store(before, 0, load(before, 0) + T.cast(comes, "int32"))
        number = T.bind(load(before, 0))
        with when(number < i32(work.count)):
            work.keep(T.bind(row * i32(work.count) + number), load(values, place), entry)

    each(read)
    gpu.sync()
    each(put)


def _ordered(value: Expr) -> Expr:
    """An int32 that compares as the float32 does: the zeros are equal, and what is not a number comes first or last."""
    bits = T.bind(T.reinterpret("int32", T.Select(value == T.float32(0), T.float32(0), value)))
    return bits ^ ((bits >> i32(31)) & i32(0x7FFFFFFF))


def _by_rounds(work: RowTopK, thread: Expr, threads: int) -> None:
    """One warp a row: every lane keeps its entries in registers, K rounds find the largest that is left."""
    warps, each = threads // LANES, -(-work.entries // LANES)
    lane, warp = T.bind(remainder(thread, LANES)), T.bind(quotient(thread, LANES))
    with loop(-(-work.rows // warps)) as step:
        row = T.bind(i32(step) * i32(warps) + warp)
        with when(row < i32(work.rows)):
            values, taken = gpu.registers(each), gpu.registers(1, "uint32")
            store(taken, 0, T.uint32(0))
            for j in range(each):
                entry = T.bind(lane + i32(j * LANES))
                store(values, j, T.float32(LOWEST))
                with when(entry < i32(work.entries)):
                    store(values, j, work.read(row * i32(work.entries) + entry))
                with when(entry >= i32(work.entries)):
                    store(taken, 0, load(taken, 0) | T.uint32(1 << j))
            with loop(work.count) as round_:
                value, entry = _best(values, taken, lane, each)
                with when(lane == i32(0)):
                    work.keep(row * i32(work.count) + i32(round_), value, entry)


def _best(values: Buffer, taken: Buffer, lane: Expr, each: int) -> tuple[Expr, Expr]:
    """The largest that is left of a warp's row, which is taken then."""
    best, entry = gpu.registers(1), gpu.registers(1, "int32")
    store(best, 0, T.float32(LOWEST))
    store(entry, 0, i32(NOWHERE))
    for j in range(each):
        free = (load(taken, 0) & T.uint32(1 << j)) == T.uint32(0)
        larger = (load(values, j) > load(best, 0)) | (load(entry, 0) == i32(NOWHERE))
        with when(free & larger):
            store(best, 0, load(values, j))
            store(entry, 0, lane + i32(j * LANES))
    step = LANES // 2
    while step:
        other = gpu.value("float32", "shuffle_xor", load(best, 0), i32(step))
        other_lane = gpu.value("int32", "shuffle_int", load(entry, 0), lane ^ i32(step))
        known = (other == load(best, 0)) & (other_lane < load(entry, 0))
        better = (other > load(best, 0)) | known | (load(entry, 0) == i32(NOWHERE))
        with when(better & (other_lane != i32(NOWHERE))):
            store(best, 0, other)
            store(entry, 0, other_lane)
        step //= 2
    for j in range(each):
        with when(load(entry, 0) == lane + i32(j * LANES)):
            store(taken, 0, load(taken, 0) | T.uint32(1 << j))
    return load(best, 0), load(entry, 0)
