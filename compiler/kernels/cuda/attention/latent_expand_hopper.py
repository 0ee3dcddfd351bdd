"""Expanded keys and values on Hopper GPUs: a block keeps its 128 rows of a matrix in shared memory.

The sums are over one latent only, so that tiles would be read nearly as often as multiplied with. A block takes every
so many tiles of latents for the same rows of the matrix; the next tile's latents are on their way while it stores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.attention.latent_expand import (
    TILE,
    halves_of,
    matrix_start,
    put_tile,
)
from moec.compiler.kernels.cuda.attention.latent_plan import counted
from moec.compiler.kernels.cuda.many.panels import (
    PANEL,
    PANEL_PIECES,
    ROW_BYTES,
    WARPGROUP,
    Panels,
    hold,
    multiply_rows,
)
from moec.compiler.kernels.cuda.many.tiles import ResultRow
from moec.compiler.kernels.cuda.primitives import MULTIPROCESSORS, i32
from moec.compiler.kernels.emit import either, i64, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.attention.latent_room import Expanded, Room
    from moec.compiler.kernels.cuda.attention.operands import Operands
    from moec.compiler.kernels.emit import Buffer, Expr

ROWS = 128
THREADS = 2 * WARPGROUP
STAGES = 4
PASS_ROWS = THREADS // PANEL_PIECES
MOST_SHARED_BYTES = 227 << 10
CHUNK = 8


def fits_expand(room: Room) -> bool:
    """Whether the rows of a matrix fit into shared memory beside tiles of latents."""
    rank = room.spec.value_dim
    return rank % PANEL == 0 and ROWS * ROW_BYTES * (rank // PANEL + STAGES) <= MOST_SHARED_BYTES


def emit_expand_hopper(operands: Operands, expanded: Expanded, number: Expr) -> None:
    """Launch: the keys and values of round ``number``."""
    spec, heads = expanded.room.spec, expanded.room.heads
    halves = halves_of(operands, expanded)
    across = sum(half.tiles for half in halves)
    groups = max(1, MULTIPROCESSORS // across)
    with cuda.launch((across, groups), THREADS) as ((column, group), thread):
        second = T.bind(column >= i32(halves[0].tiles))
        first_column = T.bind(T.Select(second, column - i32(halves[0].tiles), column) * i32(TILE.columns))
        count = T.bind(T.Select(second, i32(halves[1].columns), i32(halves[0].columns)))
        block = _Block(heads.dtype, spec.value_dim, thread)
        start = T.bind(matrix_start(halves, second) + i64(first_column) * i64(spec.value_dim))
        block.copy_matrix(halves[0].matrix, start, T.bind(count - first_column))
        cuda.call("copy_commit")
        cuda.wait_previous()
        rows = counted(expanded, 2) - i32(number) * i32(expanded.capacity)
        rows = T.bind(T.max(i32(0), T.min(rows, i32(expanded.capacity))))
        tiles = T.bind((rows + i32(ROWS - 1)) // i32(ROWS))
        mine = T.bind((tiles - group + i32(groups - 1)) // i32(groups))

        def put(tile: Expr) -> None:
            first = T.bind((group + tile * i32(groups)) * i32(ROWS))
            results = result_rows(thread)
            each = [
                (lambda half=half: put_tile(half, results, block.sums, first, first_column, expanded))
                for half in halves
            ]
            either(second, each[1], each[0])

        with when(mine > i32(0)):
            block.multiply(expanded.latents, group, groups, mine, put)
        cuda.call("copy_wait", i32(0))
        cuda.launch_next()


class _Block:
    """A block while it is emitted."""

    def __init__(self, dtype: str, rank: int, thread: Expr) -> None:
        self.dtype, self.rank, self.thread = dtype, rank, thread
        size = ROWS * ROW_BYTES * (rank // PANEL + STAGES)
        memory = cuda.shared_dynamic(size, align=1024)
        self.matrix = Panels(memory, 0, ROWS, rank)
        self.tile = Panels(memory, self.matrix.end, ROWS, PANEL)
        self.sums = cuda.registers(TILE.columns // 2)
        self.row = T.bind(thread // i32(PANEL_PIECES))
        self.piece = T.bind(thread % i32(PANEL_PIECES))

    def copy_matrix(self, matrix: Buffer, start: Expr, left: Expr) -> None:
        """Start to copy the rows of the matrix; those beyond the ``left`` that there are are read as the last."""
        place = T.bind(self.matrix.at(self.row, self.piece))
        for turn in range(ROWS // PASS_ROWS):
            row = T.bind(T.min(self.row + i32(turn * PASS_ROWS), left - i32(1)))
            source = T.bind(start + i64(row * i32(self.rank) + self.piece * i32(CHUNK)))
            for panel in range(self.rank // PANEL):
                offset = panel * self.matrix.panel_bytes + turn * PASS_ROWS * ROW_BYTES
                cuda.call(
                    "copy_async_16",
                    cuda.element(self.matrix.memory, place + i32(offset)),
                    cuda.element(matrix, source + i64(panel * PANEL)),
                )

    def multiply(self, latents: Buffer, group: Expr, groups: int, tiles: Expr, put: object) -> None:
        """All steps of all tiles in one loop; ``put(tile)`` emits what stores a tile's sums."""
        assert callable(put)
        depth = self.rank // PANEL
        steps = T.bind(tiles * i32(depth))
        part = cuda.value("int32", "shuffle_int", T.bind(self.thread // i32(WARPGROUP)), i32(0))
        left = self.tile.described(T.bind(part * i32(ROWS // 2 * ROW_BYTES)))
        right = self.matrix.described()
        place = T.bind(self.tile.at(self.row, self.piece))

        def copy(step: Expr) -> None:
            with when(step < steps):
                row = (group + step // i32(depth) * i32(groups)) * i32(ROWS) + self.row
                column = step % i32(depth) * i32(PANEL) + self.piece * i32(CHUNK)
                source = T.bind(i64(row) * i64(self.rank) + i64(column))
                target = T.bind(place + step % i32(STAGES) * i32(self.tile.panel_bytes))
                for turn in range(ROWS // PASS_ROWS):
                    cuda.call(
                        "copy_async_16",
                        cuda.element(self.tile.memory, target + i32(turn * PASS_ROWS * ROW_BYTES)),
                        cuda.element(latents, source + i64(turn * PASS_ROWS * self.rank)),
                    )
            cuda.call("copy_commit")

        for step in range(STAGES - 1):
            copy(i32(step))
        with T.serial(i32(0), steps) as step:
            cuda.call("copy_wait", i32(STAGES - 2))
            cuda.call("fence_async")
            cuda.sync()
            copy(T.bind(step + i32(STAGES - 1)))
            inside = T.bind(step % i32(depth))
            stage = T.cast(step % i32(STAGES), "uint64") * T.uint64(self.tile.panel_bytes // 16)
            panel = T.cast(inside, "uint64") * T.uint64(self.matrix.panel_bytes // 16)
            hold(self.sums)
            cuda.call("wgmma_fence")
            more = T.bind(T.cast(inside > i32(0), "int32"))
            places = T.bind(left + stage), T.bind(right + panel)
            multiply_rows(self.dtype, self.sums, *places, (self.tile, self.tile), more)
            cuda.call("wgmma_commit")
            cuda.call("wgmma_wait", i32(0))
            hold(self.sums)
            with when(inside == i32(depth - 1)):
                put(T.bind(tirx.truncdiv(step, i32(depth))))


def result_rows(thread: Expr) -> list[ResultRow]:
    """Where a thread's sums of a tile belong."""
    lane = T.bind(thread % i32(32))
    first = T.bind(thread // i32(32) * i32(16) + lane // i32(4))
    column = T.bind(lane % i32(4) * i32(2))
    rows = []
    for half in range(2):
        columns = [(column + i32(8 * part), 4 * part + 2 * half) for part in range(ROWS // 8)]
        rows.append(ResultRow(first + i32(8 * half), columns))
    return rows
