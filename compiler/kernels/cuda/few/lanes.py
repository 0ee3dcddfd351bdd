"""Which rows, columns and tokens a thread has in the decode kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.tiling import LANES
from moec.compiler.kernels.cuda.primitives import i32

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.few.tiling import Tiling
    from moec.compiler.kernels.emit import Expr

LANES_A_ROW = 4
"""That load a row's columns together."""


def quotient(number: Expr, divisor: int) -> Expr:
    """``number / divisor`` for int32 that are not negative."""
    return T.truncdiv(number, i32(divisor))


def remainder(number: Expr, divisor: int) -> Expr:
    """``number % divisor`` for int32 that are not negative."""
    return T.truncmod(number, i32(divisor))


@dataclass(frozen=True)
class Lane:
    """A thread's place in its block; all int32."""

    thread: Expr
    group: Expr
    """Row of the left operand, and token of the right one: lane / 4."""
    part: Expr
    """Which quarter of a step's columns: lane % 4."""
    row_warp: Expr
    column_warp: Expr

    @classmethod
    def of(cls, thread: Expr, tiling: Tiling) -> Lane:
        """The place of ``thread``."""
        warp, lane = T.bind(quotient(thread, LANES)), T.bind(remainder(thread, LANES))
        return cls(
            thread,
            T.bind(quotient(lane, 4)),
            T.bind(remainder(lane, 4)),
            T.bind(quotient(warp, tiling.column_warps)),
            T.bind(remainder(warp, tiling.column_warps)),
        )

    def column(self, tiling: Tiling, round_: Expr) -> Expr:
        """The first column that this lane loads in a round."""
        start = round_ * i32(tiling.round_columns) + self.column_warp * i32(tiling.step * tiling.unroll)
        return T.bind(start + self.part * i32(tiling.step // LANES_A_ROW))
