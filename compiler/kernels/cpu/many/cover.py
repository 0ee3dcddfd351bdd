"""How tokens are covered by tiles: two at a time, then one, then half of one where a vector has sixteen lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.many.block import HALF_LANES, ROWS
from moec.compiler.kernels.emit import Expr, ceildiv, div, i64, keep, loop, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cpu.many.tiles import Depth

Emit = Callable[[list[Expr], int, int], None]
"""Takes numbers of tiles, how many lanes of each are wanted, and how many rows' sums fit the registers."""


def tiles_of(tokens: Expr, lanes: int) -> Expr:
    """How many tiles hold so many tokens."""
    return ceildiv(tokens, lanes)


def cover(depth: Depth, tokens: Expr, emit: Emit) -> None:
    """Emit the products of ``tokens`` tokens, which begin with tile 0."""
    lanes = depth.machine.lanes
    halves = lanes > HALF_LANES
    spare = HALF_LANES - 1 if halves else lanes - 1
    pairs = keep(div(tokens + i64(spare), 2 * lanes))
    with loop(pairs) as number:
        first = keep(number * i64(2))
        emit([first, keep(first + i64(1))], lanes, pair_rows(lanes))
    done = keep(pairs * i64(2))
    rest = keep(T.max(tokens - done * i64(lanes), i64(0)))
    single = keep(div(rest + i64(spare), lanes))
    with loop(single) as number:
        emit([keep(done + number)], lanes, ROWS)
    if halves:
        with when(rest > single * i64(lanes)):
            emit([keep(done + single)], HALF_LANES, ROWS)


def pair_rows(lanes: int) -> int:
    """Rows of which the sums of two tiles are in registers: of 32 with 16 lanes, of 16 with fewer."""
    return ROWS // 2 if lanes == 16 else ROWS // 3
