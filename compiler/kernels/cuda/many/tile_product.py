"""A block's part of a product on tensor cores: tiles in shared memory, ``cp.async`` to fill them, ``mma`` to use them.

``sums[r, c] = sum_k a[r, k] * w[c, k]`` for a tile of rows of ``a`` and a tile of rows of ``w``, both 16-bit and
contiguous along k. Several stages of both tiles are in shared memory: while one is multiplied the others are under way.
A stage's rows are written with their 16-byte chunks permuted (``swizzle``), so that the eight rows of an 8x8 matrix lie
in different banks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.many.panels import PANEL, PANEL_PIECES, PanelRows
from moec.compiler.kernels.cuda.many.tiles import (
    CHUNK,
    MMA_COLUMNS,
    MMA_DEPTH,
    MMA_ROWS,
    ResultRow,
    Rows,
    Terms,
    Tile,
    clamp,
)
from moec.compiler.kernels.cuda.packed.tiles import PackedCopy, PackedRows, Room
from moec.compiler.kernels.cuda.primitives import LANES, i32
from moec.compiler.kernels.emit import i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.emit import Buffer, Expr


class TileProduct:
    """One block's product while it is emitted; ``thread`` is its thread number (int32)."""

    def __init__(self, tile: Tile, dtype: str, thread: Expr) -> None:
        assert tile.depth in (32, 64)
        assert tile.down * tile.warps_down * MMA_ROWS == tile.rows
        assert tile.across * tile.warps_across * MMA_COLUMNS == tile.columns
        assert tile.across % 2 == 0
        self.tile, self.dtype, self.thread = tile, dtype, thread
        self.lane = T.bind(thread % i32(LANES))
        warp = T.bind(thread // i32(LANES))
        self.first_row = T.bind(warp // i32(tile.warps_across) * i32(tile.rows // tile.warps_down))
        self.first_column = T.bind(warp % i32(tile.warps_across) * i32(tile.columns // tile.warps_across))
        self.memory = cuda.shared_dynamic(tile.stages * tile.stage_bytes)

    def multiply(
        self,
        a: Rows | PanelRows,
        w: Rows | PackedRows,
        before_a: Callable[[], None] = lambda: None,
        terms: int = 1,
    ) -> Buffer:
        """Emit the product; returns a thread's sums, float32 registers, see ``results``.

        Args:
            a: rows of the left operand: ``terms`` times ``a.depth`` elements, the last of them beyond ``w.depth``
                zeros.
            w: rows of the right one.
            before_a: emits what comes after the first reads of ``w`` and before the first of ``a``.
            terms: that meet the same elements of ``w``.
        """
        tile = self.tile
        each = -(-w.depth // tile.depth)
        steps = terms * each
        ahead = range(min(steps, tile.stages - 1))
        fragments = _Fragments(self)
        copy_w = self._copy_w(w, each, terms)
        copy_w.begin(len(ahead))
        before_a()
        copy_a = _Copy(self, a, tile.rows, 0, Terms(terms, each, a.depth))
        for stage in range(tile.stages - 1):
            if stage in ahead:
                copy_a.emit(i32(stage), i32(stage))
            cuda.call("copy_commit")
        copies: tuple[_Copy | PackedCopy, ...]
        copies = copy_a, copy_w
        cuda.call("copy_wait", i32(tile.stages - 2))
        cuda.sync()
        fragments.read(0, i32(0))
        with T.serial(i32(0), i32(steps)) as step:
            self._step(step, steps, copies, fragments)
        cuda.call("copy_wait", i32(0))
        return fragments.sums

    def _copy_w(self, w: Rows | PackedRows, each: int, terms: int) -> _Copy | PackedCopy:
        tile = self.tile
        base = tile.rows * tile.row_bytes
        if isinstance(w, Rows):
            return _Copy(self, w, tile.columns, base, Terms(terms, each, 0))

        def place(row: Expr, piece: Expr) -> Expr:
            return i32(base) + tile.swizzle(row, piece)

        sizes = tile.stage_bytes, tile.columns, tile.depth
        room = Room(self.memory, place, *sizes, self.thread, tile.threads)
        return PackedCopy(w, room, each, terms)

    def _step(
        self, step: Expr, steps: int, copies: tuple[_Copy | PackedCopy, ...], fragments: _Fragments
    ) -> None:
        """One stage: ahead of each group of products, read the fragments of the next one."""
        tile = self.tile
        parts = tile.depth // MMA_DEPTH
        stage = T.bind(step % i32(tile.stages))
        next_stage = T.bind((step + i32(1)) % i32(tile.stages))
        ahead = T.bind(step + i32(tile.stages - 1))
        turns = [copies] if parts == 2 else [copies[:1], copies[1:]]
        for part in range(parts):
            last = part == parts - 1
            if last:
                cuda.call("copy_wait", i32(tile.stages - 2))
                cuda.sync()
            fragments.read((part + 1) % parts, next_stage if last else stage)
            if part < len(turns):
                with when(ahead < i32(steps)):
                    for copy in turns[part]:
                        copy.emit(ahead, ahead % i32(tile.stages))
            if part == len(turns) - 1:
                cuda.call("copy_commit")
            fragments.multiply(part)

    def results(self) -> list[ResultRow]:
        """Where a thread's sums belong."""
        tile = self.tile
        first = T.bind(self.first_row + self.lane // i32(4))
        column = T.bind(self.first_column + self.lane % i32(4) * i32(2))
        columns = [column + i32(across * MMA_COLUMNS) for across in range(tile.across)]
        rows = []
        for down in range(tile.down):
            for half in range(2):
                places = [(down * tile.across + across) * 4 + half * 2 for across in range(tile.across)]
                row = first + i32(down * MMA_ROWS + half * 8)
                rows.append(ResultRow(row, list(zip(columns, places, strict=True))))
        return rows


class _Copy:
    """A thread's share of the copies of one operand: a column of chunks, every so many rows."""

    def __init__(
        self, block: TileProduct, rows: Rows | PanelRows, count: int, base_bytes: int, terms: Terms
    ) -> None:
        tile = block.tile
        assert isinstance(rows, Rows) or tile.depth == PANEL
        self.terms = terms
        self.block, self.rows = block, rows
        self.stride = tile.threads // tile.chunks
        self.turns = -(-count // self.stride)
        self.guarded = count % self.stride != 0
        assert not self.guarded or self.turns == 1
        assert self.stride % 8 == 0
        self.chunk = T.bind(block.thread % i32(tile.chunks))
        self.row = T.bind(block.thread // i32(tile.chunks))
        self.active = self.row < i32(count)
        self.place = T.bind(i32(base_bytes) + tile.swizzle(self.row, self.chunk))
        self.offsets = cuda.registers(self.turns, "uint32")
        for turn in range(self.turns):
            row = self.row + i32(turn * self.stride)
            own = T.min(row, i32(count - 1)) if self.guarded else row
            store(self.offsets, turn, T.cast(self._offset(own), "uint32"))

    def _offset(self, row: Expr) -> Expr:
        """Of this thread's chunk of a row, in units."""
        rows = self.rows
        if isinstance(rows, Rows):
            return rows.offset(row) + self.chunk * i32(CHUNK // rows.unit)
        known = clamp(row, rows.left)
        return known * i32(PANEL_PIECES) + (self.chunk ^ (known % i32(PANEL_PIECES)))

    @property
    def _unit(self) -> int:
        return self.rows.unit if isinstance(self.rows, Rows) else CHUNK

    def begin(self, count: int) -> None:
        """Start the copies of the first stages."""
        for stage in range(count):
            self.emit(i32(stage), i32(stage))

    def emit(self, step: Expr, stage: Expr) -> None:
        """Start the copies of step ``step`` of k into a stage."""
        tile = self.block.tile
        own, before = self.terms.place(step)
        first = T.bind(own * i32(tile.depth) + self.chunk * i32(CHUNK))
        if isinstance(self.rows, PanelRows):
            start = T.bind(self.rows.place(step))
        else:
            start = T.bind(self.rows.start + i64(before + own * i32(tile.depth)))
        place = T.bind(stage * i32(tile.stage_bytes) + self.place)
        for turn in range(self.turns):
            target = cuda.element(self.block.memory, place + i32(turn * self.stride * tile.row_bytes))
            source = start + i64(load(self.offsets, turn)) * i64(self._unit)
            if self.guarded:
                with when(self.active):
                    self._chunk(target, source, first)
            else:
                self._chunk(target, source, first)

    def _chunk(self, target: Expr, source: Expr, first: Expr) -> None:
        rows = self.rows
        if self._unit != CHUNK:
            self._by_element(target, source, first)
        elif isinstance(rows, PanelRows) or rows.depth % self.block.tile.depth == 0:
            cuda.call("copy_async_16", target, cuda.element(rows.buffer, source))
        else:
            inside = first < i32(rows.depth)
            origin = cuda.element(rows.buffer, T.Select(inside, source, i64(0)))
            cuda.call("copy_async_16_if", target, origin, inside)

    def _by_element(self, target: Expr, source: Expr, first: Expr) -> None:
        bits = T.decl_buffer(self.rows.buffer.shape, "uint16", data=self.rows.buffer.data)
        source = T.bind(source)
        halves = cuda.registers(CHUNK, "uint32")
        for k in range(CHUNK):
            store(halves, k, T.uint32(0))
            with when(first + i32(k) < i32(self.rows.depth)):
                store(halves, k, T.cast(load(bits, source + i64(k)), "uint32"))
        words = [load(halves, k) | (load(halves, k + 1) << T.uint32(16)) for k in range(0, CHUNK, 2)]
        cuda.call("store_16", target, *words)


class _Fragments:
    """A warp's fragments of both operands, in two sets of registers, and its sums."""

    def __init__(self, block: TileProduct) -> None:
        tile = block.tile
        self.block = block
        self.a = [cuda.registers(tile.down * 4, "uint32") for _ in range(2)]
        self.w = [cuda.registers(tile.across * 2, "uint32") for _ in range(2)]
        self.sums = cuda.registers(tile.down * tile.across * 4)
        for place in range(tile.down * tile.across * 4):
            store(self.sums, place, T.float32(0))
        row_a = T.bind(block.first_row + block.lane % i32(16))
        row_w = T.bind(block.first_column + block.lane // i32(16) * i32(8) + block.lane % i32(8))
        parts = range(tile.depth // MMA_DEPTH)
        self.place_a = [T.bind(tile.swizzle(row_a, block.lane // i32(16) + i32(2 * k))) for k in parts]
        chunk_w = T.bind(block.lane // i32(8) % i32(2))
        base_w = i32(tile.rows * tile.row_bytes)
        self.place_w = [T.bind(base_w + tile.swizzle(row_w, chunk_w + i32(2 * k))) for k in parts]

    def read(self, part: int, stage: Expr) -> None:
        """Read the fragments of 16 elements of k from a stage."""
        tile, memory = self.block.tile, self.block.memory
        base = T.bind(stage * i32(tile.stage_bytes))
        a, w = T.bind(base + self.place_a[part]), T.bind(base + self.place_w[part])
        stride = MMA_ROWS * tile.row_bytes
        for down in range(tile.down):
            target = cuda.element(self.a[part % 2], 4 * down)
            cuda.call("load_matrix", target, cuda.element(memory, a + i32(down * stride)))
        for two in range(tile.across // 2):
            target = cuda.element(self.w[part % 2], 4 * two)
            cuda.call("load_matrix", target, cuda.element(memory, w + i32(two * stride)))

    def multiply(self, part: int) -> None:
        """All products of a warp for 16 elements of k."""
        tile = self.block.tile
        a, w = self.a[part % 2], self.w[part % 2]
        for down in range(tile.down):
            for turn in range(tile.across):
                across = turn if down % 2 == 0 else tile.across - 1 - turn
                sums = cuda.element(self.sums, (down * tile.across + across) * 4)
                left = [load(a, 4 * down + k) for k in range(4)]
                cuda.mma(self.block.dtype, sums, left, [load(w, 2 * across + k) for k in range(2)])
