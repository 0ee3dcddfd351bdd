"""Rows of two matrices that take turns in a tile, by eights: a thread has the sums of both for the same columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.cuda.tiles import MMA_COLUMNS

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Expr


def row_of(column: Expr, kinds: int) -> Expr:
    """Which row of its matrix, counted from the tile's first, a column of a tile of ``kinds`` matrices is."""
    if kinds == 1:
        return column
    return column // i32(kinds * MMA_COLUMNS) * i32(MMA_COLUMNS) + column % i32(MMA_COLUMNS)


def kind_of(column: Expr, kinds: int) -> Expr:
    """The number of its matrix."""
    return column // i32(MMA_COLUMNS) % i32(kinds)
