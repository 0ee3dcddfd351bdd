"""Products on Hopper GPUs by blocks that stay and take one piece of work after the other.

The last four warps of a block do nothing but copy; the others multiply, and store results while the next piece's first
stages are under way. Every so many pieces are a block's own. A stage is *full* when the copies of all copying threads
have arrived, and *empty* when all multiplying warps are done with it: two barriers in shared memory for each. The
number of a piece lies beside its first stage. (The division of labour is that of CUTLASS's "warp-specialized
cooperative" kernels.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.many.outbox import Outbox
from moec.compiler.kernels.cuda.many.panel_copy import BulkCopy, Copiers, PanelCopy
from moec.compiler.kernels.cuda.many.panels import PANEL, WARPGROUP, PanelRows, Panels
from moec.compiler.kernels.cuda.many.tiles import Rows, Terms
from moec.compiler.kernels.cuda.many.warpgroup_sums import WarpgroupSums, WarpgroupTile
from moec.compiler.kernels.cuda.primitives import LANES, MULTIPROCESSORS, i32
from moec.compiler.kernels.emit import either, load, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cuda.many.work import Piece, Work
    from moec.compiler.kernels.emit import Buffer, Expr

COPIERS = WARPGROUP
NOTHING = -1
MOST_SUMS = 128
"""Of a thread."""


def threads(tile: WarpgroupTile) -> int:
    """Threads of a block."""
    return tile.threads + COPIERS


def blocks(total: Expr) -> Expr:
    """Blocks of a launch, int64."""
    return T.min(total, T.int64(MULTIPROCESSORS))


class Pipeline:
    """A block while it is emitted; ``block`` and ``thread`` are its numbers (int32)."""

    def __init__(self, tile: WarpgroupTile, work: Work, block: Expr, thread: Expr) -> None:
        self.tile, self.work, self.block, self.thread = tile, work, block, thread
        assert tile.groups == 2, "registers are for two groups that multiply and one that copies"
        assert tile.parts * tile.columns // 2 <= MOST_SUMS
        cuda.blocks_at_once(1)
        size_bytes = tile.stages * tile.stage_bytes
        memory = cuda.shared_dynamic(size_bytes + work.outbox_bytes, align=1024)
        left = Panels(memory, 0, tile.rows, PANEL)
        self.panels = left, Panels(memory, left.end, tile.columns, PANEL)
        self.full, self.empty = (cuda.shared(tile.stages, "uint64") for _ in range(2))
        self.numbers = cuda.shared(tile.stages, "int32")
        self.outbox = Outbox(memory, size_bytes, thread, tile.threads) if work.outbox_bytes else None

    def run(self) -> None:
        """Emit all of the block's work."""
        tile = self.tile
        with when(self.thread == i32(0)):
            for stage in range(tile.stages):
                cuda.call("phase_begin", cuda.element(self.full, stage), i32(COPIERS))
                cuda.call("phase_begin", cuda.element(self.empty, stage), i32(tile.threads // LANES))
            if self.outbox is not None:
                self.outbox.begin()
        cuda.sync()
        cuda.wait_previous()
        either(self.thread >= i32(tile.threads), self._copy, self._multiply)

    def _wait(self, barriers: Buffer, turn: Expr, stage: Expr, flip: int) -> None:
        parity = (turn // i32(self.tile.stages) + i32(flip)) % i32(2)
        cuda.call("phase_wait", cuda.element(barriers, stage), parity)

    def _copy(self) -> None:
        work, stages = self.work, i32(self.tile.stages)
        own = T.bind(self.thread - i32(self.tile.threads))
        state = cuda.registers(2, "int32")
        number, turn = 0, 1
        store(state, number, self.block)
        store(state, turn, i32(0))
        total = T.bind(i32(work.total) if work.known is None else work.known())

        def begin(stage: Expr, value: Expr) -> None:
            self._wait(self.empty, load(state, turn), stage, 1)
            with when(own == i32(0)):
                store(self.numbers, stage, value)

        with T.While(load(state, number) < total):
            current = T.bind(load(state, number))
            with work.piece(current) as piece:
                each = -(-piece.w.depth // PANEL)
                operands = self._copies(piece, Copiers(own, COPIERS, self.tile.stage_bytes), each)
                with T.serial(i32(0), i32(piece.terms * each)) as step:
                    stage = T.bind(load(state, turn) % stages)
                    begin(stage, current)
                    for operand in operands:
                        operand.emit(step, stage)
                    cuda.call("phase_copied", cuda.element(self.full, stage))
                    store(state, turn, load(state, turn) + i32(1))
            store(state, number, current + i32(MULTIPROCESSORS))
        stage = T.bind(load(state, turn) % stages)
        begin(stage, i32(NOTHING))
        cuda.call("phase_arrive", cuda.element(self.full, stage))
        cuda.launch_next()

    def _copies(self, piece: Piece, copiers: Copiers, each: int) -> list[PanelCopy | BulkCopy]:
        """Of both operands, so many steps of each term."""
        terms = Terms(piece.terms, each, piece.a.depth), Terms(piece.terms, each, 0)
        copies: list[PanelCopy | BulkCopy] = []
        for rows, target, own in zip((piece.a, piece.w), self.panels, terms, strict=True):
            if isinstance(rows, PanelRows):
                copies.append(BulkCopy(rows, target, copiers, self.full))
            else:
                assert isinstance(rows, Rows), "quantized weights need all threads"
                copies.append(PanelCopy(rows, target, own, copiers))
        return copies

    def _multiply(self) -> None:
        work = self.work
        widths = self.tile.widths or (self.tile.columns,)
        assert widths[-1] == self.tile.columns
        sums = [WarpgroupSums(self.tile, work.dtype, self.thread, self.panels, width) for width in widths]
        stages = i32(self.tile.stages)
        state = cuda.registers(2, "int32")
        number, turn = 0, 1
        store(state, turn, i32(0))
        if self.outbox is not None:
            self.outbox.start_counting()

        def look() -> None:
            stage = T.bind(load(state, turn) % stages)
            self._wait(self.full, load(state, turn), stage, 0)
            store(state, number, load(self.numbers, stage))

        look()
        with T.While(load(state, number) != i32(NOTHING)):
            current = T.bind(load(state, number))
            with work.piece(current) as piece:
                self._by_width(sums, piece, lambda own: self._piece(own, piece, state, turn))
            look()
        if self.outbox is not None:
            self.outbox.close()

    def _by_width(
        self, sums: list[WarpgroupSums], piece: Piece, emit: Callable[[WarpgroupSums], None]
    ) -> None:
        """Emit for each width of products what is done where it is the least that has all of a piece's columns."""
        own, *wider = sums
        if not wider:
            emit(own)
            return
        assert isinstance(piece.w, PanelRows), "only they say how many rows there are"
        either(
            piece.w.left <= i32(own.columns), lambda: emit(own), lambda: self._by_width(wider, piece, emit)
        )

    def _piece(self, sums: WarpgroupSums, piece: Piece, state: Buffer, turn: int) -> None:
        stages = i32(self.tile.stages)
        works = sums.works(piece.a.left if isinstance(piece.a, Rows) else None)
        sums.clear()
        steps = piece.terms * -(-piece.w.depth // PANEL)

        def leave(number: Expr) -> None:
            with when(self.thread % i32(LANES) == i32(0)):
                cuda.call("phase_arrive", cuda.element(self.empty, T.bind(number % stages)))

        with T.serial(i32(0), i32(steps)) as step:
            current = T.bind(load(state, turn))
            stage = T.bind(current % stages)
            self._wait(self.full, current, stage, 0)
            cuda.call("fence_async")
            sums.add_stage(stage, works)
            with when(step > i32(0)):
                leave(current - i32(1))
            store(state, turn, current + i32(1))
        values = sums.finish()
        leave(load(state, turn) - i32(1))
        if self.outbox is None or piece.send is None:
            piece.store(values, sums.results())
        else:
            piece.send(self.outbox, values, sums.results())
