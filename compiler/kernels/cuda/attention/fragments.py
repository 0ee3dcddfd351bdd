"""Operands of the tensor cores' 16 x 8 x 16 products from tiles in shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.primitives import call, element, i32, registers
from moec.compiler.kernels.emit import Expr, load

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.attention.tiles import Tile


def load_a(tile: Tile, row: Expr | int, lane: Expr, step: int) -> list[Expr]:
    """The left operand of a product: 16 rows from ``row``, 16 columns from ``16 * step``."""
    place = tile.at(_plus(lane % i32(16), row), lane // i32(16) + i32(2 * step))
    return _load("load_matrix", tile, place)


def load_b(tile: Tile, row: int, lane: Expr, piece: Expr | int) -> list[list[Expr]]:
    """The right operands of two products with rows as columns: 16 rows, 16 columns from ``8 * piece``."""
    inside = T.bind(lane % i32(8) + lane // i32(16) * i32(8))
    words = _load("load_matrix", tile, tile.at(_plus(inside, row), _plus(lane // i32(8) % i32(2), piece)))
    return [words[:2], words[2:]]


def load_b_transposed(tile: Tile, row: int, lane: Expr, piece: Expr | int) -> list[list[Expr]]:
    """The right operands of two products: 16 rows from ``row``, 16 columns from ``8 * piece``."""
    place = tile.at(_plus(lane % i32(16), row), _plus(lane // i32(16), piece))
    words = _load("load_matrix_transposed", tile, place)
    return [words[:2], words[2:]]


def _load(name: str, tile: Tile, place: Expr) -> list[Expr]:
    words = registers(4, "uint32")
    call(name, element(words, 0), element(tile.memory, T.bind(place)))
    return [load(words, number) for number in range(4)]


def _plus(left: Expr, right: Expr | int) -> Expr:
    return left + (i32(right) if isinstance(right, int) else right)
