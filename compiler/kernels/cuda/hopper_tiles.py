"""A block's part of a product on Hopper GPUs: as `tiles.TileProduct`, with products of four warps (``wgmma``).

A group of four warps multiplies 64 rows, or several times 64, with all columns of the tile. Products run behind the
threads' backs: while those of one stage run, the next ones are started and stages that nobody reads are filled.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.packed.tiles import PackedCopy, PackedRows, Room
from moec.compiler.kernels.cuda.panels import (
    PANEL,
    PANEL_PIECES,
    ROW_BYTES,
    STEP,
    UNIT,
    WARPGROUP,
    Panels,
    add,
)
from moec.compiler.kernels.cuda.primitives import LANES, i32
from moec.compiler.kernels.cuda.tiles import CHUNK, ResultRow, Rows, Terms
from moec.compiler.kernels.emit import i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.emit import Buffer, Expr

GROUP_ROWS = 64
"""Of one product."""


@dataclass(frozen=True)
class WarpgroupTile:
    """The sizes of a block's work: ``rows`` of a, ``columns`` (rows of w); 64 elements of k at a time."""

    rows: int
    columns: int
    groups: int
    stages: int
    blocks: int = 1
    """That a multiprocessor holds at once."""

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.groups * WARPGROUP

    @property
    def parts(self) -> int:
        """Products of 64 rows that a group does side by side."""
        return self.rows // self.groups // GROUP_ROWS

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage: the tile of a, then the tile of w."""
        return (self.rows + self.columns) * ROW_BYTES

    @property
    def part_sums(self) -> int:
        """Sums of a thread in one product."""
        return self.columns // 2


SQUARE = WarpgroupTile(rows=128, columns=128, groups=2, stages=3, blocks=2)


class WarpgroupProduct:
    """One block's product while it is emitted; ``thread`` is its thread number (int32)."""

    def __init__(self, tile: WarpgroupTile, dtype: str, thread: Expr) -> None:
        assert tile.rows == tile.groups * tile.parts * GROUP_ROWS
        assert tile.stages > 2, "one is multiplied, one may still be read, one is filled"
        self.tile, self.dtype, self.thread = tile, dtype, thread
        cuda.blocks_at_once(tile.blocks)
        memory = cuda.shared_dynamic(tile.stages * tile.stage_bytes, align=1024)
        self.left = Panels(memory, 0, tile.rows, PANEL)
        self.right = Panels(memory, self.left.end, tile.columns, PANEL)
        self.sums = cuda.registers(tile.parts * tile.part_sums)

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
        group = cuda.value("int32", "shuffle_int", T.bind(self.thread // i32(WARPGROUP)), i32(0))
        left = self.left.described(T.bind(group * i32(tile.parts * GROUP_ROWS * ROW_BYTES)))
        right = self.right.described()
        for place in range(tile.parts * tile.part_sums):
            store(self.sums, place, T.float32(0))
        works = None if a.left is None else T.bind(group * i32(tile.parts * GROUP_ROWS) < a.left)
        copy_w = self._copy_w(w, each, terms)
        copy_w.begin(min(steps, ahead))
        before_a()
        copy_a = _Copy(self, a, self.left, Terms(terms, each, a.depth))
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
            stage = T.bind(T.cast(step % i32(tile.stages), "uint64") * T.uint64(tile.stage_bytes // UNIT))
            with nullcontext() if works is None else when(works):
                self._start(T.bind(left + stage), T.bind(right + stage))
                cuda.call("wgmma_wait", i32(1))
        cuda.call("wgmma_wait", i32(0))
        self._hold()
        cuda.call("copy_wait", i32(0))
        return self.sums

    def _copy_w(self, w: Rows | PackedRows, each: int, terms: int) -> _Copy | PackedCopy:
        if isinstance(w, Rows):
            return _Copy(self, w, self.right, Terms(terms, each, 0))
        tile, panels = self.tile, self.right
        sizes = tile.stage_bytes, tile.columns, PANEL
        room = Room(panels.memory, panels.at, *sizes, self.thread, tile.threads)
        return PackedCopy(w, room, each, terms)

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

    def results(self) -> list[ResultRow]:
        """Where a thread's sums belong."""
        tile = self.tile
        lane, warp = T.bind(self.thread % i32(LANES)), T.bind(self.thread // i32(LANES))
        group, inside = warp // i32(4), warp % i32(4)
        first = T.bind(group * i32(tile.parts * GROUP_ROWS) + inside * i32(16) + lane // i32(4))
        column = T.bind(lane % i32(4) * i32(2))
        rows = []
        for part in range(tile.parts):
            for half in range(2):
                base = part * tile.part_sums + 2 * half
                columns = [(column + i32(8 * n), base + 4 * n) for n in range(tile.columns // 8)]
                rows.append(ResultRow(first + i32(part * GROUP_ROWS + half * 8), columns))
        return rows


class _Copy:
    """A thread's share of the copies of one operand: one piece of every so many rows."""

    def __init__(self, block: WarpgroupProduct, rows: Rows, target: Panels, terms: Terms) -> None:
        assert rows.unit == CHUNK, "rows are 16-byte aligned"
        self.block, self.rows, self.target = block, rows, target
        self.terms = terms
        self.piece = T.bind(block.thread % i32(PANEL_PIECES))
        row = T.bind(block.thread // i32(PANEL_PIECES))
        self.place = T.bind(target.at(row, self.piece))
        self.stride = block.tile.threads // PANEL_PIECES
        assert target.rows % self.stride == 0
        self.turns = target.rows // self.stride
        self.offsets = cuda.registers(self.turns, "uint32")
        for turn in range(self.turns):
            offset = rows.offset(row + i32(turn * self.stride)) + self.piece
            store(self.offsets, turn, T.cast(offset, "uint32"))
        turns = range(self.turns) if rows.left is not None else ()
        self.exists = [T.bind(row + i32(turn * self.stride) < rows.left) for turn in turns]

    def begin(self, count: int) -> None:
        """Start the copies of the first stages."""
        for stage in range(count):
            self.emit(i32(stage), i32(stage))

    def emit(self, step: Expr, stage: Expr) -> None:
        """Start the copies of step ``step`` of k into a stage."""
        rows, memory = self.rows, self.target.memory
        own, before = self.terms.place(step)
        start = T.bind(rows.start + i64(before + own * i32(PANEL)))
        place = T.bind(stage * i32(self.block.tile.stage_bytes) + self.place)
        inside = None
        if rows.depth % PANEL:
            inside = T.bind(own * i32(PANEL) + self.piece * i32(CHUNK) < i32(rows.depth))
        for turn in range(self.turns):
            target = cuda.element(memory, place + i32(turn * self.stride * ROW_BYTES))
            source = start + i64(load(self.offsets, turn)) * i64(CHUNK)
            with when(self.exists[turn]) if self.exists else nullcontext():
                if inside is None:
                    cuda.call("copy_async_16", target, cuda.element(rows.buffer, source))
                else:
                    origin = cuda.element(rows.buffer, T.Select(inside, source, i64(0)))
                    cuda.call("copy_async_16_if", target, origin, inside)
