"""An expert in pieces: their numbers, where each is, and how a block copies one.

A few blocks are enough for the link: what counts is that each has 16 KiB on their way. All accesses are of 16 bytes,
512 bytes side by side in a warp. Pieces of what the first product reads have the first numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.primitives import call, element, i32, registers
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.state import pieces_of
from moec.compiler.kernels.emit import at_address, i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.kernels.cuda.slots.state import State
    from moec.compiler.kernels.emit import Expr

COPY_THREADS = 256
VECTOR_BYTES = 16
VECTOR_WORDS = 4
UNROLL = words.PIECE_BYTES // (COPY_THREADS * VECTOR_BYTES)
"""Vectors of a piece that a thread copies."""


@dataclass(frozen=True)
class Pieces:
    """How the experts of a layer are cut; int64 expressions."""

    middle: Expr
    """Bytes before what only the second product reads."""
    stride: Expr
    first: Expr
    """Pieces before the middle."""
    count: Expr
    """All pieces."""

    @classmethod
    def of(cls, state: State) -> Pieces:
        """Of the layer whose state this is."""
        middle, stride = settle(state.head(words.SECOND)), settle(state.head(words.STRIDE))
        first = settle(pieces_of(middle))
        return cls(middle, stride, first, settle(first + pieces_of(stride - middle)))

    def start(self, number: Expr) -> Expr:
        """The first byte of a piece within its expert."""
        behind = self.middle + (number - self.first) * i64(words.PIECE_BYTES)
        return T.Select(number < self.first, number * i64(words.PIECE_BYTES), behind)

    def end(self, number: Expr) -> Expr:
        """Where a piece's part of the expert ends; a piece is shorter there."""
        return T.Select(number < self.first, self.middle, self.stride)

    def bytes_before(self, number: Expr) -> Expr:
        """Of the first ``number`` pieces."""
        return T.min(self.start(number), self.stride)


def share_of(block: Expr, blocks: int, count: Expr) -> Iterator[Expr]:
    """A loop over a block's share of ``count`` pieces, in turns; int64, the body is emitted once."""
    turns = settle(T.truncdiv(count - block + i64(blocks - 1), i64(blocks)))
    with T.serial(i64(0), turns) as turn:
        yield settle(turn * i64(blocks) + block)


def staged(state: State) -> Iterator[tuple[int, Expr, Expr]]:
    """The guessed experts: the number of each, where its first piece is brought ahead to, how many pieces there are."""
    place = registers(1, "int64")
    store(place, 0, state.head(words.AHEAD_PLACE))
    for number in range(words.MOST_AHEAD):
        first, count = settle(load(place, 0)), settle(state.head(words.AHEAD_PIECES + number))
        yield number, first, count
        store(place, 0, first + count * i64(words.PIECE_BYTES))


def copy_piece(source: Expr, target: Expr, size_bytes: Expr, thread: Expr) -> None:
    """Copy at most ``PIECE_BYTES`` from one address to another with ``COPY_THREADS``: read all, then write all."""
    loaded = registers(VECTOR_WORDS * UNROLL, "uint32")
    own = settle(i64(thread) * i64(VECTOR_BYTES))
    source, target = settle(source + own), settle(target + own)
    left = settle(size_bytes - own)
    steps = [number * COPY_THREADS * VECTOR_BYTES for number in range(UNROLL)]
    for number, step in enumerate(steps):
        place = element(loaded, number * VECTOR_WORDS)
        call("stream_16_if", place, source + i64(step), left > i64(step))
    for number, step in enumerate(steps):
        with when(left > i64(step)):
            place = at_address(target + i64(step), VECTOR_WORDS, "uint32")
            held = [load(loaded, i32(number * VECTOR_WORDS + word)) for word in range(VECTOR_WORDS)]
            call("store_16", element(place, i64(0)), *held)
