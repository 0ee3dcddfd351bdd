"""The pieces of guessed experts, from mapped host memory into staging memory, while nobody else wants the link."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts import ahead as words
from moec.artifacts import slots
from moec.compiler.kernels.cuda.primitives import launch, registers
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.pieces import COPY_THREADS, Pieces, copy_piece
from moec.compiler.kernels.cuda.slots.state import State
from moec.compiler.kernels.emit import Argument, arguments, build, i64, load, store, symbol

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
            state, place = State.of(state_buffer), registers(1, "int64")
            pieces = Pieces.of(state)
            store(place, 0, state.head(slots.AHEAD_PLACE))
            for number in range(slots.MOST_AHEAD):
                count = settle(state.head(slots.AHEAD_PIECES + number))
                home, target = settle(state.head(slots.AHEAD_HOME + number)), settle(load(place, 0))
                turns = settle(T.truncdiv(count - i64(block) + i64(blocks - 1), i64(blocks)))
                with T.serial(i64(0), turns) as turn:
                    piece = settle(turn * i64(blocks) + i64(block))
                    start = settle(pieces.start(piece))
                    to = target + piece * i64(slots.PIECE_BYTES)
                    copy_piece(home + start, to, pieces.end(piece) - start, thread)
                store(place, 0, target + count * i64(slots.PIECE_BYTES))

    return build(words.BRING, body)
