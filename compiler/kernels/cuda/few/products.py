"""The products of a warp's steps with at most eight tokens, and their sums, whatever the weights come through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.stream import SPLITS, WORDS
from moec.compiler.kernels.cuda.few.tiling import STEP_COLUMNS
from moec.compiler.kernels.cuda.primitives import element, i32, mma, registers
from moec.compiler.kernels.emit import load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.few.lanes import Lane
    from moec.compiler.kernels.cuda.few.stream import Activations, Stream, Sums
    from moec.compiler.kernels.emit import Expr


class Products:
    """What one warp multiplies and adds up, and where a lane's weights lie.

    Args:
        stream: the weights of the block.
        lane: this thread.
        activations: the right operand.
        ending: where the sums of a tile go.
    """

    def __init__(self, stream: Stream, lane: Lane, activations: Activations, ending: Sums) -> None:
        self.stream, self.lane, self.activations, self.tiling = stream, lane, activations, stream.tiling
        self.rounds = self.tiling.rounds(stream.columns)
        self.exact = self.rounds * self.tiling.round_columns == stream.columns
        self.single = self.rounds == 1 and isinstance(stream.tiles, int) and stream.tiles == 1
        self.lines = 2 * self.tiling.streams
        """Rows that a lane loads of."""
        self.addresses = registers(self.lines, "int64")
        self.sums = registers(2 * WORDS * self.tiling.streams)
        self.ending = ending

    def aim(self, tile: Expr, round_: Expr) -> None:
        """Set the addresses of this lane's first loads in a round."""
        offset = T.bind(T.cast(self.lane.column(self.tiling, round_), "int64") * T.int64(2))
        for stream in range(self.tiling.streams):
            for half in range(2):
                address = self.stream.locate(tile, stream, half) + offset
                store(self.addresses, i32(2 * stream + half), address)

    def address(self, slot: int, line: int) -> Expr:
        """Where 16 bytes of a step lie, after ``aim``."""
        return load(self.addresses, i32(line)) + T.int64(2 * STEP_COLUMNS * slot)

    def inside(self, slot: int, column: Expr, more: Expr | None) -> Expr | None:
        """Whether there is such a step in a round that begins at ``column``; ``None`` where there always is."""
        if self.exact:
            return more
        inside = column + i32(STEP_COLUMNS * slot) < i32(self.stream.columns)
        return T.bind(inside if more is None else tirx.all(more, inside))

    def clear(self) -> None:
        """Begin a tile."""
        for place in range(2 * WORDS * self.tiling.streams):
            store(self.sums, i32(place), T.float32(0))

    def step(self, slot: int, round_: Expr, words: list[list[Expr]]) -> None:
        """Multiply a step, of whose lines a lane has four words each."""
        parts = self.activations.operands(slot, round_)
        for stream in range(self.tiling.streams):
            low, high = words[2 * stream], words[2 * stream + 1]
            for pair in (0, 2):
                left = [low[pair], high[pair], low[pair + 1], high[pair + 1]]
                for part, right in enumerate(parts):
                    sums = element(self.sums, (2 * stream + part) * WORDS)
                    mma(self.stream.dtype, sums, left, right[pair : pair + 2])

    def add_up(self, tile: Expr) -> None:
        """End a tile."""
        ending = self.ending
        for column in range(2):
            token = T.bind(self.lane.part * i32(2) + i32(column))
            with when(token < self.stream.tokens):
                place = ending.place(tile, token)
                for stream in range(self.tiling.streams):
                    for half in range(2):
                        ending.store(place, stream, half, self._sum(stream, 2 * half + column))
        ending.done(tile)

    def _sum(self, stream: int, place: int) -> Expr:
        split = SPLITS[self.stream.dtype]
        hi = load(self.sums, i32(2 * WORDS * stream + place)) * T.float32(1 / split.scale)
        lo = load(self.sums, i32(2 * WORDS * stream + WORDS + place))
        return hi + lo * T.float32(1 / (split.scale * split.lift))
