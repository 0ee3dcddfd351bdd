"""Missing experts from mapped host memory into the places that ``assign_experts`` found for them.

Every byte crosses the link once. First of all experts come what the first product reads, then the rest; every piece
that has arrived is counted, so that whoever computes can begin meanwhile. Pieces that were brought ahead are already on
the GPU: blocks of their own copy those, and leave the link to the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.primitives import (
    call,
    i32,
    launch,
    launch_next,
    registers,
    sync,
    wait_previous,
)
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.pieces import COPY_THREADS, Pieces, copy_piece, share_of, staged
from moec.compiler.kernels.cuda.slots.state import State
from moec.compiler.kernels.emit import Argument, arguments, build, either, i64, load, store, symbol, when

if TYPE_CHECKING:
    from tvm import tirx

    from moec.compiler.kernels.emit import Expr

BLOCKS = 32
"""That read host memory."""
AHEAD_BLOCKS = 32
"""That copy what was brought ahead."""


def fetch(blocks: int = BLOCKS, ahead_blocks: int = AHEAD_BLOCKS) -> tirx.PrimFunc:
    """The kernel ``fetch_experts(state)``; an expert's stride is a multiple of 16 bytes.

    Whatever ran before it is over when the kernel after it begins, but it itself may not be.
    """

    def body() -> None:
        size = symbol("W")
        (state_buffer,) = arguments(Argument("state", (size,), "int64"))
        with launch((blocks + ahead_blocks,), COPY_THREADS) as ((block,), thread):
            wait_previous()
            launch_next()
            state = State.of(state_buffer)
            pieces = Pieces.of(state)
            either(
                block < i32(blocks),
                lambda: _from_host(state, pieces, block, blocks, thread),
                lambda: from_ahead(state, pieces, block - i32(blocks), ahead_blocks, thread),
            )

    return build(words.FETCH, body)


def _from_host(state: State, pieces: Pieces, block: Expr, blocks: int, thread: Expr) -> None:
    """All pieces that were not brought ahead, part by part; both parts go round the blocks as one list."""
    fetches = settle(state.head(words.FETCHES))
    for second, (each, skipped, before) in enumerate(
        (
            (pieces.first, i64(0), i64(0)),
            (settle(pieces.count - pieces.first), pieces.first, settle(fetches * pieces.first)),
        )
    ):
        own = settle(T.truncmod(i64(block) + i64(blocks) - T.truncmod(before, i64(blocks)), i64(blocks)))
        for number in share_of(own, blocks, fetches * each):
            which = settle(T.truncdiv(number, each))
            piece = settle(number - which * each + skipped)
            with when(piece >= brought_ahead(state, which)):
                start = settle(pieces.start(piece))
                source = state.at(words.SOURCE, which) + start
                bring_piece(state, which, i64(second), source, start, pieces.end(piece), thread)


def from_ahead(state: State, pieces: Pieces, block: Expr, blocks: int, thread: Expr) -> None:
    """The pieces that were brought ahead, of experts that are fetched."""
    for expert, place, count in staged(state):
        which = settle(state.head(words.AHEAD_FETCH + expert))
        with when(which >= i64(0)):
            for piece in share_of(i64(block), blocks, count):
                start, second = settle(pieces.start(piece)), T.cast(piece >= pieces.first, "int64")
                source = place + piece * i64(words.PIECE_BYTES)
                bring_piece(state, which, second, source, start, pieces.end(piece), thread)


def brought_ahead(state: State, which: Expr) -> Expr:
    """How many pieces of a fetch were brought ahead."""
    count = registers(1, "int64")
    store(count, 0, i64(0))
    for expert in range(words.MOST_AHEAD):
        with when(state.head(words.AHEAD_FETCH + expert) == which):
            store(count, 0, state.head(words.AHEAD_PIECES + expert))
    return settle(load(count, 0))


def bring_piece(
    state: State, which: Expr, second: Expr, source: Expr, start: Expr, end: Expr, thread: Expr
) -> None:
    """Copy one piece, ``start`` to ``end`` of its expert, to where that goes, and count it."""
    copy_piece(source, state.at(words.TARGET, which) + start, end - start, thread)
    sync()
    with when(thread == i32(0)):
        call("signal", state.arrived(which, second), i32(1))
