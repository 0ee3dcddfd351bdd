"""Missing experts from mapped host memory into the places that ``assign_experts`` found for them.

A few blocks are enough for the link: what counts is that each has 16 KiB on their way. All accesses are of 16 bytes,
512 bytes side by side in a warp, and every byte crosses the link once. First of all experts come what the first product
reads, then the rest; every piece that has arrived is counted, so that whoever computes can begin meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts import slots as words
from moec.compiler.kernels.cuda.primitives import (
    call,
    element,
    i32,
    launch,
    launch_next,
    registers,
    sync,
    wait_previous,
)
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.state import State, pieces_of
from moec.compiler.kernels.emit import Argument, arguments, at_address, build, i64, load, symbol, when

if TYPE_CHECKING:
    from tvm import tirx

    from moec.compiler.kernels.emit import Expr

BLOCKS = 32
THREADS = 256
VECTOR_BYTES = 16
VECTOR_WORDS = 4
UNROLL = words.PIECE_BYTES // (THREADS * VECTOR_BYTES)
"""Vectors of a piece that a thread copies."""


def fetch(blocks: int = BLOCKS) -> tirx.PrimFunc:
    """The kernel ``fetch_experts(state)``; an expert's stride is a multiple of 16 bytes.

    Whatever ran before it is over when the kernel after it begins, but it itself may not be.
    """

    def body() -> None:
        size = symbol("W")
        (state_buffer,) = arguments(Argument("state", (size,), "int64"))
        with launch((blocks,), THREADS) as ((block,), thread):
            wait_previous()
            launch_next()
            state = State.of(state_buffer)
            stride, middle = settle(state.head(words.STRIDE)), settle(state.head(words.SECOND))
            fetches = settle(state.head(words.FETCHES))
            first = settle(fetches * pieces_of(middle))
            for second, (offset, end, before) in enumerate(
                ((i64(0), middle, i64(0)), (middle, stride, first))
            ):
                each = settle(pieces_of(end - offset))
                # Both parts go round the blocks as one list.
                own = settle(
                    T.truncmod(i64(block) + i64(blocks) - T.truncmod(before, i64(blocks)), i64(blocks))
                )
                turns = settle(T.truncdiv(fetches * each - own + i64(blocks - 1), i64(blocks)))
                with T.serial(i64(0), turns) as turn:
                    number = settle(turn * i64(blocks) + own)
                    which = settle(T.truncdiv(number, each))
                    start = settle(offset + (number - which * each) * i64(words.PIECE_BYTES))
                    _copy(state, which, start, end, thread)
                    sync()
                    with when(thread == i32(0)):
                        call("signal", state.arrived(which, second))

    return build(words.FETCH, body)


def _copy(state: State, which: Expr, start: Expr, end: Expr, thread: Expr) -> None:
    """Read all vectors of this thread in the piece that begins at ``start``, then write them."""
    loaded = registers(VECTOR_WORDS * UNROLL, "uint32")
    own = settle(start + i64(thread) * i64(VECTOR_BYTES))
    source = settle(state.at(words.SOURCE, which) + own)
    target = settle(state.at(words.TARGET, which) + own)
    left = settle(end - own)
    steps = [number * THREADS * VECTOR_BYTES for number in range(UNROLL)]
    for number, step in enumerate(steps):
        place = element(loaded, number * VECTOR_WORDS)
        call("stream_16_if", place, source + i64(step), left > i64(step))
    for number, step in enumerate(steps):
        with when(left > i64(step)):
            place = at_address(target + i64(step), VECTOR_WORDS, "uint32")
            held = [load(loaded, i32(number * VECTOR_WORDS + word)) for word in range(VECTOR_WORDS)]
            call("store_16", element(place, i64(0)), *held)
