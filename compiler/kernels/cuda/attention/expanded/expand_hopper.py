"""Expanded keys and values on Hopper GPUs: a product of blocks that stay, whose latents lie in panels."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.expanded.expand import halves_of, matrix_start, put_tile
from moec.compiler.kernels.cuda.attention.expanded.plan import ALIGNED, counted
from moec.compiler.kernels.cuda.many.panels import PANEL, PanelRows
from moec.compiler.kernels.cuda.many.tiles import CHUNK, Rows
from moec.compiler.kernels.cuda.many.warpgroup_sums import WarpgroupTile
from moec.compiler.kernels.cuda.many.work import Piece, Work
from moec.compiler.kernels.cuda.many.work_launch import emit_work
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import ceildiv, i64

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.kernels.cuda.attention.expanded.room import Expanded, Room
    from moec.compiler.kernels.cuda.attention.operands import Operands
    from moec.compiler.kernels.cuda.many.tiles import ResultRow
    from moec.compiler.kernels.emit import Buffer, Expr

TILE = WarpgroupTile(rows=128, columns=256, groups=2, stages=4, copiers=True)
assert ALIGNED % TILE.rows == 0, "a round's rows are whole tiles"


def fits_expand(room: Room) -> bool:
    """Whether latents can lie in panels."""
    return room.spec.value_dim % PANEL == 0


def emit_expand_hopper(operands: Operands, expanded: Expanded, number: Expr) -> None:
    """Launch: the keys and values of round ``number``."""
    spec, heads = expanded.room.spec, expanded.room.heads
    halves = halves_of(operands, expanded)
    across = [-(-half.columns // TILE.columns) for half in halves]

    def tiles() -> Expr:
        """Of latents, in this round."""
        rows = counted(expanded, 2) - i32(number) * i32(expanded.capacity)
        return T.max(i32(0), T.min(rows, i32(expanded.capacity))) // i32(TILE.rows)

    @contextmanager
    def piece(place: Expr) -> Iterator[Piece]:
        first = T.bind(place // i32(sum(across)) * i32(TILE.rows))
        tile = T.bind(place % i32(sum(across)))
        second = T.bind(tile >= i32(across[0]))
        first_column = T.bind(T.Select(second, tile - i32(across[0]), tile) * i32(TILE.columns))
        count = T.Select(second, i32(halves[1].columns), i32(halves[0].columns))
        last = T.bind(count - first_column - i32(1))
        start = T.bind(matrix_start(halves, second) + i64(first_column) * i64(spec.value_dim))
        rank = spec.value_dim
        latents = PanelRows(expanded.latents, i64(first), expanded.capacity, rank, i32(TILE.rows))
        matrix = Rows(halves[0].matrix, start, lambda row: T.min(row, last) * i32(rank // CHUNK), CHUNK, rank)

        def keep(sums: Buffer, results: list[ResultRow]) -> None:
            put_tile(halves, second, results, sums, (first, first_column), expanded, TILE.columns)

        yield Piece(latents, matrix, keep)

    most = ceildiv(expanded.capacity, TILE.rows) * i64(sum(across))
    work = Work(most, piece, heads.dtype, finds_early=False, known=lambda: tiles() * i32(sum(across)))
    emit_work(TILE, work, packed=False)
