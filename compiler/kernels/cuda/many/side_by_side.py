"""Rows of two matrices that take turns in a tile, by eights: a thread has the sums of both for the same columns."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.many.tiles import MMA_COLUMNS
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.kernels.cuda.many.tiles import ResultRow
    from moec.compiler.kernels.emit import Expr


def row_of(column: Expr, kinds: int) -> Expr:
    """Which row of its matrix, counted from the tile's first, a column of a tile of ``kinds`` matrices is."""
    if kinds == 1:
        return column
    return column // i32(kinds * MMA_COLUMNS) * i32(MMA_COLUMNS) + column % i32(MMA_COLUMNS)


def kind_of(column: Expr, kinds: int) -> Expr:
    """The number of its matrix."""
    return column // i32(MMA_COLUMNS) % i32(kinds)


def groups_of(
    result: ResultRow, kinds: int, first: Expr, rows: int, columns: int
) -> Iterator[tuple[Expr, list[int]]]:
    """Rows of the matrices of which a thread has sums; the body is emitted once for each.

    Args:
        result: a row of the tile.
        kinds: how many matrices take turns.
        first: the tile's first row of each matrix.
        rows: of each.
        columns: of each matrix's rows in a tile.

    Yields:
        the row (int32), and where the sums of each matrix are.
    """
    for number in range(0, len(result.columns), kinds):
        group = result.columns[number : number + kinds]
        row = T.bind(first + row_of(group[0][0], kinds))
        with when(row < i32(rows)) if rows % columns else nullcontext():
            yield row, [place for _, place in group]
