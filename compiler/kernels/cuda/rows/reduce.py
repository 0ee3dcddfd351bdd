"""Sums, largest and smallest values of a region's rows, by the threads of one block.

Where there are as many results as warps each warp combines what its results are of; otherwise all threads combine what
one is of, result after result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as gpu
from moec.compiler.kernels.cuda.few.lanes import remainder
from moec.compiler.kernels.cuda.primitives import LANES, i32
from moec.compiler.kernels.cuda.rows.topk import LOWEST
from moec.compiler.kernels.emit import load, loop, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.emit import Expr

STARTS = {"sum": 0.0, "max": LOWEST, "min": -LOWEST}
COMBINE: dict[str, Callable[[Expr, Expr], Expr]] = {"sum": lambda a, b: a + b, "max": T.max, "min": T.min}


@dataclass(frozen=True)
class RowReduction:
    """What is combined."""

    kind: str
    """One of ``COMBINE``."""
    results: int
    elements: int
    """That each result is of."""
    reader: Callable[[Expr], Callable[[Expr], Expr]]
    """For the number of a result (int32): the float32 of each of its elements, by number (int32)."""
    keep: Callable[[Expr, Expr], None]
    """``(number of a result, its value)``; int32, float32."""

    def combine(self, a: Expr, b: Expr) -> Expr:
        """Of two values."""
        return COMBINE[self.kind](a, b)


def emit_reduction(work: RowReduction, thread: Expr, threads: int) -> None:
    """Emit it; all threads of a block take part, and what they read must be there."""
    warps = threads // LANES
    if work.results < warps:
        for number in range(work.results):
            _by_block(work, i32(number), thread, threads)
        return
    lane, warp = T.bind(remainder(thread, LANES)), T.bind(T.truncdiv(thread, i32(LANES)))
    with loop(-(-work.results // warps)) as step:
        number = T.bind(i32(step) * i32(warps) + warp)
        with when(number < i32(work.results)):
            total = _of_warp(work, _partial(work, number, lane, LANES))
            with when(lane == i32(0)):
                work.keep(number, total)


def _by_block(work: RowReduction, number: Expr, thread: Expr, threads: int) -> None:
    warps = threads // LANES
    partials = gpu.shared(warps)
    total = _of_warp(work, _partial(work, number, thread, threads))
    with when(remainder(thread, LANES) == i32(0)):
        store(partials, T.truncdiv(thread, i32(LANES)), total)
    gpu.sync()
    with when(thread == i32(0)):
        result = gpu.registers(1)
        store(result, 0, load(partials, 0))
        for warp in range(1, warps):
            store(result, 0, work.combine(load(result, 0), load(partials, warp)))
        work.keep(number, load(result, 0))


def _partial(work: RowReduction, number: Expr, first: Expr, stride: int) -> Expr:
    """What one thread combines: elements ``first``, ``first + stride``, ..."""
    read, total = work.reader(number), gpu.registers(1)
    store(total, 0, T.float32(STARTS[work.kind]))
    with loop(-(-work.elements // stride)) as step:
        element = T.bind(i32(step) * i32(stride) + first)
        with when(element < i32(work.elements)):
            store(total, 0, work.combine(load(total, 0), T.bind(read(element))))
    return T.bind(load(total, 0))


def _of_warp(work: RowReduction, total: Expr) -> Expr:
    """All lanes' values, which every lane then has."""
    step = LANES // 2
    while step:
        other = gpu.value("float32", "shuffle_xor", total, i32(step))
        total = T.bind(work.combine(total, other))
        step //= 2
    return total
