"""The pieces of guessed experts, from mapped host memory into staging memory, while nobody else wants the link."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.words import ahead as words
from moec.artifacts.words import slots
from moec.compiler.kernels.cuda.primitives import launch
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.pieces import COPY_THREADS, Pieces, copy_piece, share_of, staged
from moec.compiler.kernels.cuda.slots.state import State
from moec.compiler.kernels.emit import Argument, arguments, build, i64, symbol

if TYPE_CHECKING:
    from tvm import tirx

BLOCKS = 16
"""Enough for the link; attention and the products around it run beside them."""


def bring(blocks: int = BLOCKS) -> tirx.PrimFunc:
    """The kernel ``bring_ahead(state)``: what ``guess_experts`` said."""

    def body() -> None:
        size = symbol("W")
        (state_buffer,) = arguments(Argument("state", (size,), "int64"))
        with launch((blocks,), COPY_THREADS) as ((block,), thread):
            state = State.of(state_buffer)
            pieces = Pieces.of(state)
            for number, place, count in staged(state):
                home = settle(state.head(slots.AHEAD_HOME + number))
                for piece in share_of(i64(block), blocks, count):
                    start = settle(pieces.start(piece))
                    target = place + piece * i64(slots.PIECE_BYTES)
                    copy_piece(home + start, target, pieces.end(piece) - start, thread)

    return build(words.BRING, body)
