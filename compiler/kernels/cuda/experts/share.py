"""Which tiles of rows a block of the experts' first launch takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.tiling import BLOCKS_AT_ONCE, TILE_ROWS
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import ceildiv, i64

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cuda.experts.call import ExpertCall
    from moec.compiler.kernels.cuda.few.tiling import Tiling
    from moec.compiler.kernels.emit import Expr

MOST_TILES = 8
"""Of a block: with more, those that are done early leave a multiprocessor half empty for too long."""


@dataclass(frozen=True)
class TileShare:
    """The tiles of rows that a block of the first launch takes, one after the other: their number depends on T * K."""

    tiles: int
    """Of an expert."""
    most: int | Expr
    """Of a block; int64 where it is not known."""

    @classmethod
    def of(cls, body: ExpertBody, call_: ExpertCall, tiling: Tiling) -> TileShare:
        """So many that all blocks are there at once, or ``MOST_TILES``.

        Quantized weights are few bytes: what a block does before its first product would take longer than these.
        """
        tiles = -(-body.intermediate // (TILE_ROWS * tiling.row_warps))
        if body.format is None:
            return cls(tiles, 1)
        wanted = ceildiv(i64(tiles) * call_.tokens * call_.chosen, BLOCKS_AT_ONCE)
        return cls(tiles, T.max(i64(1), T.min(wanted, i64(min(tiles, MOST_TILES)))))

    @property
    def blocks(self) -> Expr:
        """For each choice, int64."""
        return i64(self.tiles) if self.most == 1 else T.truncdiv(i64(self.tiles - 1) + self.most, self.most)

    def first(self, block: Expr) -> Expr:
        """The first tile of a block, int32."""
        return block if self.most == 1 else T.bind(block * i32(self.most))

    def count(self, block: Expr) -> int | Expr:
        """How many tiles a block takes."""
        if self.most == 1:
            return 1
        return T.bind(T.min(i32(self.most), i32(self.tiles) - self.first(block)))
