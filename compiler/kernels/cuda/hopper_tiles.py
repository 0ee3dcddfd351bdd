"""A block's part of a product on Hopper GPUs: as `tiles.TileProduct`, with products of four warps.

A tile is 128 x 128, 64 rows for each of two groups of four warps. Three stages of 64 elements of k are in shared
memory, so that two blocks fit on a multiprocessor: one multiplies while the other waits for its first tiles or stores
its results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.emit import i64, load, store, when
from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.panels import (
    PANEL,
    PANEL_PIECES,
    ROW_BYTES,
    WARPGROUP,
    Panels,
    hold,
    multiply_rows,
)
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.cuda.tiles import CHUNK, ResultRow

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cpu.emit import Buffer, Expr
    from moec.compiler.kernels.cuda.tiles import Rows

ROWS, COLUMNS = 128, 128
THREADS = 2 * WARPGROUP
STAGES = 3
PASS_ROWS = THREADS // PANEL_PIECES


class WarpgroupProduct:
    """One block's product while it is emitted; ``thread`` is its thread number (int32)."""

    def __init__(self, dtype: str, thread: Expr) -> None:
        self.dtype, self.thread = dtype, thread
        self.left = Panels(None, 0, ROWS, PANEL)
        self.right = Panels(None, self.left.end, COLUMNS, PANEL)
        self.stage_bytes = self.right.end
        memory = cuda.shared_dynamic(STAGES * self.stage_bytes, align=1024)
        self.left = Panels(memory, 0, ROWS, PANEL)
        self.right = Panels(memory, self.left.end, COLUMNS, PANEL)
        self.sums = cuda.registers(COLUMNS // 2)

    def multiply(self, a: Rows, w: Rows, before_a: Callable[[], None] = lambda: None) -> Buffer:
        """Emit the product; returns a thread's sums, float32 registers, see ``results``.

        Args:
            a: rows of the left operand, 16-byte aligned; elements from ``w.depth`` on are zeros.
            w: rows of the right one, 16-byte aligned.
            before_a: emits what comes after the first reads of ``w`` and before the first of ``a``.
        """
        steps = -(-w.depth // PANEL)
        group = cuda.value("int32", "shuffle_int", T.bind(self.thread // i32(WARPGROUP)), i32(0))
        left = self.left.described(T.bind(group * i32(ROWS // 2 * ROW_BYTES)))
        right = self.right.described()
        copies = _Copy(self, a, self.left), _Copy(self, w, self.right)
        for stage in range(min(steps, STAGES - 1)):
            copies[1].emit(i32(stage))
        before_a()
        for stage in range(STAGES - 1):
            if stage < steps:
                copies[0].emit(i32(stage))
            cuda.call("copy_commit")
        with T.serial(i32(0), i32(steps)) as step:
            cuda.call("copy_wait", i32(STAGES - 2))
            cuda.call("fence_async")
            cuda.sync()
            ahead = T.bind(step + i32(STAGES - 1))
            with when(ahead < i32(steps)):
                for copy in copies:
                    copy.emit(ahead)
            cuda.call("copy_commit")
            units = T.bind(T.cast(step % i32(STAGES), "uint64") * T.uint64(self.stage_bytes // 16))
            hold(self.sums)
            cuda.call("wgmma_fence")
            places = T.bind(left + units), T.bind(right + units)
            more = T.bind(T.cast(step > i32(0), "int32"))
            multiply_rows(self.dtype, self.sums, *places, (self.left, self.right), more)
            cuda.call("wgmma_commit")
            cuda.call("wgmma_wait", i32(0))
            hold(self.sums)
        cuda.call("copy_wait", i32(0))
        return self.sums

<<<<<<<< HEAD:compiler/kernels/cuda/warpgroup_tiles.py
========
    def _arrive(self, ahead: int) -> None:
        """Until the oldest stage under way is there for products to read, and nobody reads the one before last."""
        cuda.call("copy_wait", i32(ahead - 1))
        cuda.call("fence_async")
        cuda.sync()

    def _start(self, left: Expr, right: Expr) -> None:
        """Start the products of one stage."""
        tile = self.tile
        self._hold()
        cuda.call("wgmma_fence")
        name = f"wgmma_{cuda.SHORT[self.dtype]}_n{tile.columns}"
        for step in range(PANEL // STEP):
            inside = self.left.along_row(step)
            for part in range(tile.parts):
                rows = add(left, part * GROUP_ROWS * ROW_BYTES // UNIT + inside)
                sums = cuda.element(self.sums, part * tile.part_sums)
                cuda.call(name, sums, rows, add(right, inside), i32(1))
        cuda.call("wgmma_commit")
        self._hold()

    def _hold(self) -> None:
        """Keep the compiler from moving uses of the sums across this."""
        for part in range(self.tile.parts):
            sums = cuda.element(self.sums, part * self.tile.part_sums)
            cuda.call(f"hold_{self.tile.part_sums}", sums)

>>>>>>>> 2d39419 (Tiles by what they were measured to take; quick activations where 16 bits follow; kernels that are alike are launched by both functions):compiler/kernels/cuda/hopper_tiles.py
    def results(self) -> list[ResultRow]:
        """Where a thread's sums belong."""
        return result_rows(self.thread)


def result_rows(thread: Expr) -> list[ResultRow]:
    """Where a thread's sums of a tile belong."""
    lane = T.bind(thread % i32(32))
    first = T.bind(thread // i32(32) * i32(16) + lane // i32(4))
    column = T.bind(lane % i32(4) * i32(2))
    rows = []
    for half in range(2):
        columns = [(column + i32(8 * part), 4 * part + 2 * half) for part in range(COLUMNS // 8)]
        rows.append(ResultRow(first + i32(8 * half), columns))
    return rows


class _Copy:
    """A thread's share of the copies of one operand: one piece of every so many rows."""

    def __init__(self, block: WarpgroupProduct, rows: Rows, target: Panels) -> None:
        assert rows.unit == CHUNK
        self.block, self.rows, self.target = block, rows, target
        self.piece = T.bind(block.thread % i32(PANEL_PIECES))
        row = T.bind(block.thread // i32(PANEL_PIECES))
        self.place = T.bind(target.at(row, self.piece))
        self.turns = target.rows // PASS_ROWS
        self.offsets = cuda.registers(self.turns, "uint32")
        for turn in range(self.turns):
            offset = rows.offset(row + i32(turn * PASS_ROWS)) + self.piece
            store(self.offsets, turn, T.cast(offset, "uint32"))

    def emit(self, step: Expr) -> None:
        """Start the copies of step ``step`` of k."""
        rows, memory = self.rows, self.target.memory
        start = T.bind(rows.start + i64(step * i32(PANEL)))
        place = T.bind(step % i32(STAGES) * i32(self.block.stage_bytes) + self.place)
        inside = None
        if rows.depth % PANEL:
            inside = T.bind(step * i32(PANEL) + self.piece * i32(CHUNK) < i32(rows.depth))
        for turn in range(self.turns):
            target = cuda.element(memory, place + i32(turn * PASS_ROWS * ROW_BYTES))
            source = start + i64(load(self.offsets, turn)) * i64(CHUNK)
            if inside is None:
                cuda.call("copy_async_16", target, cuda.element(rows.buffer, source))
            else:
                origin = cuda.element(rows.buffer, T.Select(inside, source, i64(0)))
                cuda.call("copy_async_16_if", target, origin, inside)
