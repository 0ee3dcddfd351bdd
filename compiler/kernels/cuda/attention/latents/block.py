"""A block of attention over latents: how rows and dimensions are divided, and what it holds in memory and registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cuda.attention.operands import LOWEST
from moec.compiler.kernels.cuda.attention.tiles import Tile
from moec.compiler.kernels.cuda.primitives import i32, registers, shared_dynamic
from moec.compiler.kernels.emit import Buffer, Expr, load, store

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec

WIDTH = PAGE_TOKENS
"""Keys of a tile."""
WIDEST_KEY, WIDEST_VALUE = 576, 512
OWN = 8
"""Scores that a lane turns to weights: of one row, keys 2t and 2t + 1 of every eight."""


@dataclass(frozen=True)
class Shape:
    """The division of one kernel."""

    spec: AttentionSpec
    row_tiles: int
    """Times 16 rows."""
    exact: bool
    """The upper eight rows of a tile hold what rounding the lower eight left out: of queries, and of weights."""
    across: int = 2
    """Warps that share a tile of rows; more than two where it is ``exact``."""

    @property
    def rows(self) -> int:
        """Rows on the tensor cores."""
        return 16 * self.row_tiles

    @property
    def warps(self) -> int:
        """Of a block."""
        return self.across * self.row_tiles

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps

    @property
    def steps(self) -> int:
        """Pieces of 16 dimensions that a warp has of a query."""
        return -(-self.spec.key_dim // (16 * self.across))

    @property
    def dimensions(self) -> int:
        """Of a key, with room for all warps' steps."""
        return 16 * self.across * self.steps

    @property
    def columns(self) -> int:
        """Dimensions of values that a warp has, a multiple of 16."""
        return -(-self.spec.value_dim // (16 * self.warps)) * 16

    @property
    def fragments(self) -> int:
        """Fragments of 8 columns that a warp has of each tile of rows."""
        return self.columns // 8

    @property
    def tile_bytes(self) -> int:
        """One tile of keys."""
        return self._tile(None, 0).end

    @property
    def shared_bytes(self) -> int:
        """Two tiles of keys, weights, scores on their way between warps, and a number for each row."""
        weights = Tile(None, 2 * self.tile_bytes, self.rows, WIDTH)
        return weights.end + 4 * (32 * OWN * self.warps + self.rows)

    def _tile(self, memory: Buffer, start: int | Expr) -> Tile:
        return Tile(memory, start, WIDTH, self.dimensions)


@dataclass(frozen=True)
class Block:
    """A block's memory, and a lane's part of the running softmax."""

    shape: Shape
    memory: Buffer
    words: Buffer
    """The same memory as float32."""
    bits: Buffer
    """The same memory as uint32."""
    warp: Expr
    lane: Expr
    row_tile: Expr
    share: Expr
    """Which dimensions of the queries are this warp's."""
    half: Expr
    """Which rows of the tile it turns to weights: of more than two warps several do the same, and the first keep it."""
    row: Expr
    """The lane's row."""
    queries: Buffer
    highest: Buffer
    total: Buffer
    """Of the lane's own keys."""
    values: Buffer
    """``[row_tiles][fragments][4]``."""

    def keys(self, number: Expr) -> Tile:
        """One of the two tiles of keys."""
        start = T.bind(number * i32(self.shape.tile_bytes))
        return Tile(self.memory, start, WIDTH, self.shape.dimensions)

    @property
    def weights(self) -> Tile:
        """Weights of a tile's keys, 16 bits."""
        return Tile(self.memory, 2 * self.shape.tile_bytes, self.shape.rows, WIDTH)

    @property
    def exchange(self) -> int:
        """Where scores are handed over, in words."""
        return self.weights.end // 4

    @property
    def row_numbers(self) -> int:
        """Where a number for each row is, in words."""
        return self.exchange + 32 * OWN * self.shape.warps


def begin(shape: Shape, thread: Expr) -> Block:
    """Nothing seen yet; the queries' registers are zero."""
    memory = shared_dynamic(shape.shared_bytes)
    count = shape.shared_bytes // 4
    words, bits = (T.decl_buffer((count,), kind, data=memory.data) for kind in ("float32", "uint32"))
    warp, lane = T.bind(thread // i32(32)), T.bind(thread % i32(32))
    row_tile, share = T.bind(warp % i32(shape.row_tiles)), T.bind(warp // i32(shape.row_tiles))
    half = share if shape.across == 2 else T.bind(share % i32(2))
    row = T.bind(row_tile * i32(16) + half * i32(8) + lane // i32(4))
    size = 4 * shape.row_tiles * shape.fragments
    queries, values = registers(4 * shape.steps, "uint32"), registers(size)
    highest, total = registers(1), registers(1)
    for place in range(4 * shape.steps):
        store(queries, place, T.uint32(0))
    for place in range(size):
        store(values, place, T.float32(0))
    store(highest, 0, T.float32(LOWEST))
    store(total, 0, T.float32(0))
    return Block(
        shape,
        memory,
        words,
        bits,
        warp,
        lane,
        row_tile,
        share,
        half,
        row,
        queries,
        highest,
        total,
        values,
    )


def row_number(block: Block, row_tile: int, upper: int) -> Expr:
    """The number that is kept for row g, or 8 + g, of a tile of rows."""
    return load(
        block.words, T.bind(i32(block.row_numbers + 16 * row_tile + 8 * upper) + block.lane // i32(4))
    )
