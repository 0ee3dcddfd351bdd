"""Which tile a product of many tokens gets: a choice on the host by T, one launch in each arm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.many.gemm import emit_parts
from moec.compiler.kernels.cuda.many.panels import PANEL
from moec.compiler.kernels.cuda.many.tiles import CHUNK, Tile
from moec.compiler.kernels.cuda.many.warpgroup_sums import WarpgroupTile
from moec.compiler.kernels.cuda.primitives import MULTIPROCESSORS
from moec.compiler.kernels.emit import either, i64

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.compiler.kernels.cuda.many.gemm import Operand, Part
    from moec.compiler.kernels.cuda.many.work_launch import BlockTile
    from moec.compiler.kernels.emit import Expr

LARGE = Tile(rows=128, columns=128, depth=64, warps_down=2, warps_across=2, stages=3)
"""Two blocks on a multiprocessor of an A100 or H100, one on smaller ones."""
SMALL = Tile(rows=64, columns=64, depth=64, warps_down=2, warps_across=2, stages=4)
"""For few rows, which are there to fill the machine and to stream the weights."""
NARROW = Tile(rows=16, columns=32, depth=64, warps_down=1, warps_across=2, stages=8)
"""For weights of few rows: many blocks, each with many copies under way."""
NARROW_ROWS = 64
"""Of such weights, whatever the number of tokens."""
FILLED_BLOCKS = 128
"""Blocks of the large tile that fill a GPU well enough: fewer, and the small tile is quicker."""


@dataclass(frozen=True)
class Timed:
    """A tile, and what it takes: measured on an H200 (prompts of 512 to 4,096 tokens, 2,048 to 5,632 rows)."""

    tile: BlockTile
    step_ns: int
    """A multiprocessor's blocks: 64 elements of k."""
    fixed_ns: int
    """Their first copies and their results."""
    blocks: int = 1
    """At once on a multiprocessor."""


HOPPER = (
    Timed(WarpgroupTile(rows=128, columns=256, groups=2, stages=4, copiers=True), 740, 6000),
    Timed(WarpgroupTile(rows=256, columns=128, groups=2, stages=4, copiers=True), 690, 6000),
    Timed(WarpgroupTile(rows=128, columns=192, groups=2, stages=5, copiers=True), 540, 4800),
    Timed(WarpgroupTile(rows=128, columns=128, groups=2, stages=6, copiers=True), 400, 3100),
    Timed(SMALL, 450, 1500, blocks=2),
)
"""For Hopper GPUs."""
HOPPER_NARROW = HOPPER[3], Timed(NARROW, 150, 2000, blocks=4)
"""For what is as narrow as a router."""


def emit_product(a: Operand, parts: Sequence[Part], *, hopper: bool = False) -> None:
    """Emit the products with a tile that suits T; arguments as of `emit_parts`."""
    with_tile(parts, lambda tile: emit_parts(a, parts, tile), hopper=hopper)


def with_tile(parts: Sequence[Part], emit: Callable[[BlockTile], None], *, hopper: bool) -> None:
    """Emit products in each of the tiles that may suit T, and the choice."""
    product = parts[0].product
    tokens, rows = product.tokens, [part.product.rows for part in parts]
    if sum(rows) <= NARROW_ROWS and product.batch == 1:
        emit(NARROW)
        return
    if not hopper or product.depth % CHUNK:
        across = sum(-(-count // LARGE.columns) for count in rows) * product.batch
        few_rows = LARGE.rows * max(1, FILLED_BLOCKS // across) - LARGE.rows // 2
        either(
            tokens <= i64(few_rows),
            lambda: emit(SMALL),
            lambda: emit(LARGE),
        )
        return
    steps = product.terms * -(-product.depth // PANEL)
    tiles = HOPPER if product.terms == 1 else HOPPER_NARROW
    costs = [T.bind(_nanoseconds(timed, tokens, rows, product.batch, steps)) for timed in tiles]
    best = T.bind(reduce(T.min, costs))

    def choose(number: int) -> None:
        if number == len(tiles) - 1:
            emit(tiles[number].tile)
            return
        either(
            costs[number] == best,
            lambda: emit(tiles[number].tile),
            lambda: choose(number + 1),
        )

    choose(0)


def _nanoseconds(timed: Timed, tokens: Expr, rows: Sequence[int], batch: int, steps: int) -> Expr:
    """What the products would take: so many rounds of blocks."""
    tile = timed.tile
    across = sum(-(-count // tile.columns) for count in rows) * batch
    blocks = tirx.truncdiv(tokens + i64(tile.rows - 1), i64(tile.rows)) * i64(across)
    at_once = MULTIPROCESSORS * timed.blocks
    rounds = tirx.truncdiv(blocks + i64(at_once - 1), i64(at_once))
    return rounds * i64(steps * timed.step_ns + timed.fixed_ns)
