"""Choices beyond an expert's capacity lose their weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.capacity import declare, tokens_taken
from moec.compiler.kernels.cuda.primitives import i32, launch, launch_next, registers, wait_previous
from moec.compiler.kernels.emit import build, ceildiv, i64, load, loop, store, when

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import ExpertsLayer
    from moec.compiler.kernels.cpu.capacity import CapacityOperands
    from moec.compiler.kernels.emit import Expr

THREADS = 128


def capacity(name: str, layer: ExpertsLayer) -> tirx.PrimFunc:
    """The kernel of a ``capacity`` step, see `moec.compiler.kernels.cpu.capacity`: a thread counts for each expert.

    All threads read the same chosen expert at a time: a step of a few thousand tokens takes some tens of microseconds.
    """

    def body() -> None:
        operands = declare(layer)
        with launch((ceildiv(i64(layer.experts), THREADS),), THREADS) as ((block,), thread):
            launch_next()
            wait_previous()
            expert = T.bind(T.cast(block * i32(THREADS) + thread, "int64"))
            first = registers(1, "int32")
            store(first, 0, i32(0))
            with T.While(load(first, 0) < i32(operands.count)):
                begin = T.bind(load(first, 0))
                end = _end(operands, begin)
                _count(operands, layer, expert, begin, end)
                store(first, 0, end)

    return build(name, body)


def _end(operands: CapacityOperands, first: Expr) -> Expr:
    """The end of the call that begins with token ``first``, int32."""
    count = T.bind(i32(operands.count))
    end = registers(1, "int32")
    store(end, 0, first + i32(1))
    with T.While(
        T.And(
            load(end, 0) < count,
            load(operands.calls, T.min(load(end, 0), count - i32(1))).equal(first),
        )
    ):
        store(end, 0, load(end, 0) + i32(1))
    return T.bind(load(end, 0))


def _count(operands: CapacityOperands, layer: ExpertsLayer, expert: Expr, first: Expr, end: Expr) -> None:
    """Keep the weights of the choices of one call that are ``expert``, as many as it takes."""
    most = T.bind(i32(tokens_taken(layer, i64(end - first))))
    taken = registers(1, "int32")
    store(taken, 0, i32(0))
    with loop(layer.top_k) as choice, T.serial(i32(0), end - first) as number:
        place = T.bind(i64(first + number) * i64(layer.top_k) + choice)
        with when(load(operands.index, place).equal(expert)):
            store(taken, 0, load(taken, 0) + i32(1))
            kept = T.Select(load(taken, 0) <= most, load(operands.weight, place), T.float32(0))
            store(operands.out, place, kept)
