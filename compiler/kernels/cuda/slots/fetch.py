"""Missing experts from mapped host memory into the places that ``assign_experts`` found for them.

A few blocks are enough for the link: what counts is that each has 16 KiB on their way. All accesses are of 16 bytes, 512
bytes side by side in a warp, and every byte crosses the link once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts import slots as words
from moec.compiler.kernels.cpu.emit import Argument, arguments, at_address, build, i64, load, symbol, when
from moec.compiler.kernels.cuda.primitives import (
    call,
    element,
    i32,
    launch,
    launch_next,
    registers,
    wait_previous,
)
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.state import State

if TYPE_CHECKING:
    from tvm import tirx

    from moec.compiler.kernels.cpu.emit import Expr

BLOCKS = 64
THREADS = 256
UNROLL = 4
VECTOR_BYTES = 16
VECTOR_WORDS = 4
PIECE_BYTES = THREADS * UNROLL * VECTOR_BYTES
"""That a block has on their way at once."""


def fetch(blocks: int = BLOCKS, unroll: int = UNROLL) -> tirx.PrimFunc:
    """The kernel ``fetch_experts(state)``; an expert's stride is a multiple of 16 bytes."""

    def body() -> None:
        size = symbol("W")
        (state_buffer,) = arguments(Argument("state", (size,), "int64"))
        with launch((blocks,), THREADS) as ((block,), thread):
            wait_previous()
            launch_next()
            state = State.of(state_buffer)
            stride, piece = settle(state.head(words.STRIDE)), i64(THREADS * unroll * VECTOR_BYTES)
            pieces = settle(T.truncdiv(stride + piece - i64(1), piece))
            total = settle(state.head(words.FETCHES) * pieces)
            turns = settle(T.truncdiv(total - i64(block) + i64(blocks - 1), i64(blocks)))
            with T.serial(i64(0), turns) as turn:
                number = settle(turn * i64(blocks) + i64(block))
                which = settle(T.truncdiv(number, pieces))
                start = settle((number - which * pieces) * piece + i64(thread) * i64(VECTOR_BYTES))
                source, target = settle(state.at(words.SOURCE, which)), settle(state.at(words.TARGET, which))
                _copy(settle(source + start), settle(target + start), settle(stride - start), unroll)

    return build(words.FETCH, body)


def _copy(source: Expr, target: Expr, left: Expr, unroll: int) -> None:
    """Read all vectors of this thread in a piece, then write them; ``left`` bytes of the expert come from here on."""
    loaded = registers(VECTOR_WORDS * unroll, "uint32")
    step = THREADS * VECTOR_BYTES
    for number in range(unroll):
        inside = left > i64(number * step)
        call("stream_16_if", element(loaded, number * VECTOR_WORDS), source + i64(number * step), inside)
    for number in range(unroll):
        with when(left > i64(number * step)):
            place = at_address(target + i64(number * step), VECTOR_WORDS, "uint32")
            held = [load(loaded, i32(number * VECTOR_WORDS + word)) for word in range(VECTOR_WORDS)]
            call("store_16", element(place, i64(0)), *held)
