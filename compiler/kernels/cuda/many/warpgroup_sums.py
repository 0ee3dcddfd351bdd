"""Hopper's products of four warps (``wgmma``) of one stage of two operands in shared memory, and whose the sums are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.many.panels import PANEL, ROW_BYTES, STEP, UNIT, WARPGROUP, Panels, add
from moec.compiler.kernels.cuda.many.tiles import ResultRow
from moec.compiler.kernels.cuda.primitives import LANES, i32
from moec.compiler.kernels.emit import either, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr

GROUP_ROWS = 64
"""Of one product."""


@dataclass(frozen=True)
class WarpgroupTile:
    """The sizes of a block's work: ``rows`` of a, ``columns`` (rows of w); 64 elements of k at a time."""

    rows: int
    columns: int
    groups: int
    """Of four warps that multiply."""
    stages: int
    copiers: bool = False
    """Whether blocks stay and have four more warps that copy, see `pipeline`."""
    widths: tuple[int, ...] = ()
    """Of products, multiples of 16 up to ``columns``: the least that has all of a tile's columns is taken, where there
    is a choice (and ``copiers``)."""

    @property
    def threads(self) -> int:
        """That multiply."""
        return self.groups * WARPGROUP

    @property
    def parts(self) -> int:
        """Products of 64 rows that a group does side by side."""
        return self.rows // self.groups // GROUP_ROWS

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage: the tile of a, then the tile of w."""
        return (self.rows + self.columns) * ROW_BYTES


class WarpgroupSums:
    """A thread's sums of one tile while they are emitted; ``thread`` is its number among those that multiply.

    Of the tile's columns the first ``columns`` are multiplied, or all.
    """

    def __init__(
        self,
        tile: WarpgroupTile,
        dtype: str,
        thread: Expr,
        panels: tuple[Panels, Panels],
        columns: int | None = None,
    ) -> None:
        assert tile.rows == tile.groups * tile.parts * GROUP_ROWS
        self.tile, self.dtype, self.thread = tile, dtype, thread
        self.panels = panels
        self.columns = columns or tile.columns
        self.part_sums = self.columns // 2
        self.sums = cuda.registers(tile.parts * self.part_sums)
        group = cuda.value("int32", "shuffle_int", T.bind(thread // i32(WARPGROUP)), i32(0))
        self.first_row = T.bind(group * i32(tile.parts * GROUP_ROWS))
        self.left = panels[0].described(T.bind(self.first_row * i32(ROW_BYTES)))
        self.right = panels[1].described()

    def clear(self) -> None:
        """All sums zero."""
        for place in range(self.tile.parts * self.part_sums):
            store(self.sums, place, T.float32(0))

    def works(self, rows: Expr | None) -> list[Expr]:
        """Which parts of this group have any of the tile's ``rows`` (int32); nothing where all have."""
        if rows is None:
            return []
        parts = range(self.tile.parts)
        return [T.bind(self.first_row + i32(part * GROUP_ROWS) < rows) for part in parts]

    def add_stage(self, stage: Expr, works: list[Expr]) -> None:
        """Start the products of a stage (int32), and wait for those before them."""
        offset = T.bind(T.cast(stage, "uint64") * T.uint64(self.tile.stage_bytes // UNIT))
        left, right = T.bind(self.left + offset), T.bind(self.right + offset)

        def start(parts: int) -> None:
            self._start(left, right, parts)
            cuda.call("wgmma_wait", i32(1))

        def some(parts: int) -> None:
            if parts == 1:
                with when(works[0]):
                    start(1)
            else:
                either(works[parts - 1], lambda: start(parts), lambda: some(parts - 1))

        if works:
            some(self.tile.parts)
        else:
            start(self.tile.parts)

    def _start(self, left: Expr, right: Expr, parts: int) -> None:
        self._hold()
        cuda.call("wgmma_fence")
        name = f"wgmma_{cuda.SHORT[self.dtype]}_n{self.columns}"
        for step in range(PANEL // STEP):
            inside = self.panels[0].along_row(step)
            for part in range(parts):
                rows = add(left, part * GROUP_ROWS * ROW_BYTES // UNIT + inside)
                sums = cuda.element(self.sums, part * self.part_sums)
                cuda.call(name, sums, rows, add(right, inside), i32(1))
        cuda.call("wgmma_commit")
        self._hold()

    def finish(self) -> Buffer:
        """Wait for all products; the sums, float32 registers."""
        cuda.call("wgmma_wait", i32(0))
        self._hold()
        return self.sums

    def _hold(self) -> None:
        """Keep the compiler from moving uses of the sums across this."""
        for part in range(self.tile.parts):
            sums = cuda.element(self.sums, part * self.part_sums)
            cuda.call(f"hold_{self.part_sums}", sums)

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
                base = part * self.part_sums + 2 * half
                columns = [(column + i32(8 * n), base + 4 * n) for n in range(self.columns // 8)]
                rows.append(ResultRow(first + i32(part * GROUP_ROWS + half * 8), columns))
        return rows
