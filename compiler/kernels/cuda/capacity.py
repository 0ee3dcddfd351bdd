"""Tokens beyond an expert's capacity lose their weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.capacity import capacity_arguments
from moec.compiler.kernels.cpu.emit import build, ceildiv, i64, load, store, when
from moec.compiler.kernels.cuda.primitives import i32, launch, launch_next, registers, wait_previous

if TYPE_CHECKING:
    from tvm import tirx

THREADS = 128


def capacity(name: str, *, experts: int, tokens: int) -> tirx.PrimFunc:
    """The kernel of a ``capacity`` step, see `moec.compiler.kernels.cpu.capacity`: a thread counts for each expert.

    All threads read the same chosen expert at a time: a step of a few thousand tokens takes some tens of microseconds.
    """

    def body() -> None:
        index, weight, calls, out, count = capacity_arguments()
        with launch((ceildiv(i64(experts), THREADS),), THREADS) as ((block,), thread):
            launch_next()
            wait_previous()
            expert = T.bind(T.cast(block * i32(THREADS) + thread, "int64"))
            taken = registers(1, "int32")
            store(taken, 0, i32(0))
            with T.serial(i32(0), T.cast(count, "int32")) as token:
                with when(load(calls, token).equal(token)):
                    store(taken, 0, i32(0))
                with when(load(index, token).equal(expert)):
                    store(taken, 0, load(taken, 0) + i32(1))
                    kept = T.Select(load(taken, 0) <= i32(tokens), load(weight, token), T.float32(0))
                    store(out, token, kept)

    return build(name, body)
