"""What a block's part of a product is: a tile of rows of ``a`` and one of rows of ``w``, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.primitives import LANES, i32

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.emit import Buffer, Expr

CHUNK = 8
"""16-bit elements in 16 bytes: what one asynchronous copy moves."""
CHUNK_BYTES = 16
MMA_ROWS, MMA_COLUMNS, MMA_DEPTH = 16, 8, 16


@dataclass(frozen=True)
class Tile:
    """The sizes of a block's work: ``rows`` of a, ``columns`` (rows of w), ``depth`` elements of k at a time."""

    rows: int
    columns: int
    depth: int
    warps_down: int
    warps_across: int
    stages: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps_down * self.warps_across * LANES

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage: the tile of a, then the tile of w."""
        return (self.rows + self.columns) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """One row of a stage."""
        return 2 * self.depth

    @property
    def chunks(self) -> int:
        """16-byte chunks of one row of a stage: 4 or 8."""
        return self.depth // CHUNK

    @property
    def down(self) -> int:
        """16-row fragments of a warp."""
        return self.rows // self.warps_down // MMA_ROWS

    @property
    def across(self) -> int:
        """8-column fragments of a warp."""
        return self.columns // self.warps_across // MMA_COLUMNS

    def swizzle(self, row: Expr, chunk: Expr) -> Expr:
        """Where a chunk of a row lies in a stage's tile, in bytes."""
        turn = (row >> i32(1)) & i32(3) if self.chunks == 4 else row & i32(7)
        return row * i32(self.row_bytes) + (chunk ^ turn) * i32(CHUNK_BYTES)


@dataclass(frozen=True)
class Rows:
    """Rows of a 16-bit matrix in global memory, as a block sees them.

    Row r of its tile begins at element ``start + unit * offset(r)`` and is ``depth`` elements long. ``offset`` is
    evaluated once for each row that a thread copies and must be inside the matrix for every row of the tile. A ``unit``
    of 8 says that rows are 16-byte aligned; rows that are not are copied element by element.
    """

    buffer: Buffer
    start: Expr
    offset: Callable[[Expr], Expr]
    """From the row's number within the tile (int32) to an int32."""
    unit: int
    depth: int
    left: Expr | None = None
    """How many of the tile's rows there are (int32), where it pays to leave out the work of others."""


@dataclass(frozen=True)
class Terms:
    """How an operand is read where several terms of a meet the same elements of w, one after the other."""

    count: int
    steps: int
    """Of each term."""
    distance: int
    """Elements from one term to the next: 0 for w."""

    def place(self, step: Expr) -> tuple[Expr, Expr]:
        """A step's number within its term, and the elements from the first term to that one."""
        if self.count == 1:
            return step, i32(0)
        own, term = T.bind(step % i32(self.steps)), step // i32(self.steps)
        return own, T.bind(term * i32(self.distance))


@dataclass(frozen=True)
class ResultRow:
    """A thread's results in one row of the tile."""

    row: Expr
    """Within the tile, int32."""
    columns: list[tuple[Expr, int]]
    """Even columns within the tile (int32), each with the place of its sum; the next column's sum is next to it."""


def clamp(row: Expr, limit: Expr) -> Expr:
    """``row``, or the last row below ``limit``: rows beyond the end are computed from it and never stored."""
    return T.min(row, limit - tirx.IntImm("int32", 1))
