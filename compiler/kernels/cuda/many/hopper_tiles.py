"""A block's part of a product on Hopper GPUs: as `tile_product.TileProduct`, with products of four warps (``wgmma``).

Products run behind the threads' backs: while those of one stage run, the next ones are started and stages that nobody
reads are filled, by the same threads. `pipeline` has threads of their own for that; what is quantized needs them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.many.panel_copy import Copiers, PanelCopy
from moec.compiler.kernels.cuda.many.panels import PANEL, Panels
from moec.compiler.kernels.cuda.many.tiles import Rows, Terms
from moec.compiler.kernels.cuda.many.warpgroup_sums import WarpgroupSums, WarpgroupTile
from moec.compiler.kernels.cuda.packed.tiles import PackedCopy, PackedRows, Room
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cuda.many.tiles import ResultRow
    from moec.compiler.kernels.emit import Buffer, Expr


class WarpgroupProduct:
    """One block's product while it is emitted; ``thread`` is its thread number (int32)."""

    def __init__(self, tile: WarpgroupTile, dtype: str, thread: Expr) -> None:
        assert tile.stages > 2, "one is multiplied, one may still be read, one is filled"
        self.tile, self.thread = tile, thread
        cuda.blocks_at_once(1)
        memory = cuda.shared_dynamic(tile.stages * tile.stage_bytes, align=1024)
        self.left = Panels(memory, 0, tile.rows, PANEL)
        self.right = Panels(memory, self.left.end, tile.columns, PANEL)
        self.copiers = Copiers(thread, tile.threads, tile.stage_bytes)
        self.sums = WarpgroupSums(tile, dtype, thread, (self.left, self.right))

    def multiply(
        self, a: Rows, w: Rows | PackedRows, before_a: Callable[[], None] = lambda: None, terms: int = 1
    ) -> Buffer:
        """Emit the product; returns a thread's sums, float32 registers, see ``results``.

        Args:
            a: rows of the left operand, 16-byte aligned: ``terms`` times ``a.depth`` elements, the last of them beyond
                ``w.depth`` zeros.
            w: rows of the right one, 16-byte aligned.
            before_a: emits what comes after the first reads of ``w`` and before the first of ``a``.
            terms: that meet the same elements of ``w``.
        """
        tile = self.tile
        each, ahead = -(-w.depth // PANEL), tile.stages - 2
        steps = terms * each
        self.sums.clear()
        works = self.sums.works(a.left)
        copy_w = self._copy_w(w, each, terms)
        copy_w.begin(min(steps, ahead))
        before_a()
        copy_a = PanelCopy(a, self.left, Terms(terms, each, a.depth), self.copiers)
        for stage in range(ahead):
            if stage < steps:
                copy_a.emit(i32(stage), i32(stage))
            cuda.call("copy_commit")
        with T.serial(i32(0), i32(steps)) as step:
            self._arrive(ahead)
            later = T.bind(step + i32(ahead))
            with when(later < i32(steps)):
                place = T.bind(later % i32(tile.stages))
                copy_a.emit(later, place)
                copy_w.emit(later, place)
            cuda.call("copy_commit")
            self.sums.add_stage(step % i32(tile.stages), works)
        sums = self.sums.finish()
        cuda.call("copy_wait", i32(0))
        return sums

    def _copy_w(self, w: Rows | PackedRows, each: int, terms: int) -> PanelCopy | PackedCopy:
        if isinstance(w, Rows):
            return PanelCopy(w, self.right, Terms(terms, each, 0), self.copiers)
        tile, panels = self.tile, self.right
        sizes = tile.stage_bytes, tile.columns, PANEL
        room = Room(panels.memory, panels.at, *sizes, self.thread, tile.threads)
        return PackedCopy(w, room, each, terms)

    def _arrive(self, ahead: int) -> None:
        """Until the oldest stage under way is there for products to read, and nobody reads the one before last."""
        cuda.call("copy_wait", i32(ahead - 1))
        cuda.call("fence_async")
        cuda.sync()

    def results(self) -> list[ResultRow]:
        """Where a thread's sums belong."""
        return self.sums.results()
