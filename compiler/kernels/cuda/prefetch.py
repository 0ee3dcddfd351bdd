"""Bring weights that later calls read into the second-level cache, while others use little of the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.prefetch import RANGES
from moec.compiler.kernels.cpu.emit import Argument, arguments, build, i64, load, when
from moec.compiler.kernels.cuda.primitives import LANES, call, launch, launch_next, wait_previous

if TYPE_CHECKING:
    from tvm import tirx

    from moec.compiler.kernels.cpu.emit import Expr

BLOCKS = 64
LINE_BYTES = 128


def prefetch() -> tirx.PrimFunc:
    """``prefetch(ranges [RANGES, 2] int64)``: address (a multiple of 16) and bytes of each range, 0 for none.

    Nothing is written: a GPU before sm_90, which has no instruction for whole ranges, does nothing.
    """

    def body() -> None:
        (ranges,) = arguments(Argument("ranges", (RANGES, 2), "int64"))
        with launch((BLOCKS,), LANES) as ((block,), thread):
            launch_next()
            wait_previous()  # those before it are hindered by what this sets in motion, attention is not
            with when(thread < T.int32(RANGES)):
                address, size = (
                    load(ranges, T.cast(thread, "int64") * i64(2) + i64(part)) for part in (0, 1)
                )
                _share(T.bind(address), T.bind(size), T.cast(block, "int64"))

    return build("prefetch", body)


def _share(address: Expr, size: Expr, block: Expr) -> None:
    """This block's part of a range: whole lines."""
    lines = T.truncdiv(size + i64(LINE_BYTES * BLOCKS - 1), i64(LINE_BYTES * BLOCKS))
    each = T.bind(lines * i64(LINE_BYTES))
    start = T.bind(block * each)
    with when(start < size):
        call("prefetch_range", address + start, T.cast(T.min(each, size - start), "uint32"))
