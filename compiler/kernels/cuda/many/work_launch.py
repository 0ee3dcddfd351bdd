"""One launch for the pieces of a product: a block each, or on Hopper GPUs blocks that stay and take turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.many import pipeline
from moec.compiler.kernels.cuda.many.hopper_tiles import WarpgroupProduct
from moec.compiler.kernels.cuda.many.panels import PanelRows
from moec.compiler.kernels.cuda.many.tile_product import TileProduct
from moec.compiler.kernels.cuda.many.tiles import Rows, Tile
from moec.compiler.kernels.cuda.many.warpgroup_sums import WarpgroupTile

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.many.work import Work
    from moec.compiler.kernels.emit import Expr

BlockTile = Tile | WarpgroupTile


def emit_work(tile: BlockTile, work: Work, *, packed: bool) -> None:
    """Emit the launch.

    Args:
        tile: of a block.
        work: for the blocks.
        packed: whether ``w`` is quantized: all threads are needed to unpack it, so that none are for copies alone.
    """
    if isinstance(tile, WarpgroupTile) and tile.copiers and not packed:
        with cuda.launch((pipeline.blocks(work.total),), pipeline.threads(tile)) as ((block,), thread):
            pipeline.Pipeline(tile, work, block, thread).run()
        return
    with cuda.launch((work.total,), tile.threads) as ((block,), thread):
        if not work.finds_early:
            cuda.wait_previous()
        with work.piece(block) as piece:
            assert not isinstance(piece.w, PanelRows), "blocks that do not stay copy rows"
            product = _product(tile, work.dtype, thread)
            before_a = cuda.wait_previous if work.finds_early else lambda: None
            if isinstance(product, WarpgroupProduct):
                assert isinstance(piece.a, Rows)
                sums = product.multiply(piece.a, piece.w, before_a, piece.terms)
            else:
                sums = product.multiply(piece.a, piece.w, before_a, piece.terms)
            cuda.launch_next()
            piece.store(sums, product.results())


def _product(tile: BlockTile, dtype: str, thread: Expr) -> TileProduct | WarpgroupProduct:
    if isinstance(tile, Tile):
        return TileProduct(tile, dtype, thread)
    return WarpgroupProduct(tile, dtype, thread)
