"""Matrices in shared memory as Hopper's products of four warps take them.

A matrix of 16-bit elements is cut into *panels* of 64 columns; a panel's rows of 128 bytes lie one after the other, the
16-byte pieces of a row permuted: piece p of row r is at ``p ^ (r % 8)`` (CUTLASS calls it the 128-byte swizzle). Read
along rows it is an operand whose columns are summed over, read across them one whose rows are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.many.tiles import CHUNK
from moec.compiler.kernels.cuda.primitives import SHORT, call, element, i32, value
from moec.compiler.kernels.emit import i64, load

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr

PANEL = 64
"""Columns of a panel."""
ROW_BYTES = 128
PANEL_PIECES = 8
WARPGROUP = 128
"""Threads that multiply together; they have 64 rows."""
STEP = 16
"""What one product sums over."""
UNIT = 16
"""Bytes that places in a matrix's description are counted in."""


def in_panels(columns: int) -> int:
    """Columns of whole panels."""
    return -(-columns // PANEL) * PANEL


def panel_element(row: Expr, column: Expr, rows: Expr, turn: Expr) -> Expr:
    """Where a column of a row of a matrix in global memory lies that is cut into panels, see `PanelRows`; int64.

    Args:
        row: int64.
        column: int32.
        rows: of the matrix, int64.
        turn: what the row's pieces are permuted by, int32 below 8.
    """
    panel, inside = i64(column // i32(PANEL)), column % i32(PANEL)
    piece = (inside // i32(CHUNK) ^ turn) * i32(CHUNK) + inside % i32(CHUNK)
    return T.bind((panel * rows + row) * i64(PANEL) + i64(piece))


@dataclass(frozen=True)
class PanelRows:
    """A tile's rows of a matrix in global memory that is cut into panels too, one after the other.

    A panel of 64 columns is ``[rows, 64]``; pieces of the tile's row r are permuted by ``r % 8`` as in shared memory: a
    tile's part of a panel is copied as it lies.
    """

    buffer: Buffer
    start: Expr
    """First row, int64."""
    rows: Expr
    """Of the matrix, int64."""
    depth: int
    """Columns; what the last panel has beyond them are zeros."""
    left: Expr
    """Rows of the tile, int32."""

    def place(self, panel: Expr) -> Expr:
        """Element (int64) at which the tile's part of a panel begins."""
        return (i64(panel) * self.rows + self.start) * i64(PANEL)


@dataclass(frozen=True)
class Panels:
    """A matrix of ``rows`` (a multiple of 8) times ``size`` elements (a multiple of 64) in dynamic shared memory."""

    memory: Buffer
    start: int
    """Byte offset, a multiple of 1024."""
    rows: int
    size: int

    @property
    def pieces(self) -> int:
        """16-byte pieces of a row."""
        return self.size // 8

    @property
    def panel_bytes(self) -> int:
        """One panel."""
        return self.rows * ROW_BYTES

    @property
    def end(self) -> int:
        """Byte offset behind it."""
        return self.start + self.size // PANEL * self.panel_bytes

    def at(self, row: Expr, piece: Expr) -> Expr:
        """Byte offset of a piece (int32)."""
        panel, inside = piece // i32(PANEL_PIECES), piece % i32(PANEL_PIECES)
        place = row * i32(ROW_BYTES) + (inside ^ (row % i32(8))) * i32(16)
        return i32(self.start) + panel * i32(self.panel_bytes) + place

    def described(self, first_byte: Expr | int = 0) -> Expr:
        """The matrix from ``first_byte`` on (a multiple of 1024), as products take it."""
        start = i32(self.start) + (i32(first_byte) if isinstance(first_byte, int) else first_byte)
        place = element(self.memory, T.bind(start))
        return value("uint64", "matrix", place, i32(self.panel_bytes))

    def along_row(self, step: int) -> int:
        """What to add to a description to begin ``step`` times 16 columns further on."""
        panel, inside = divmod(step * STEP, PANEL)
        return (panel * self.panel_bytes + 2 * inside) // UNIT


def add(description: Expr, units: int) -> Expr:
    """A description of what begins so many units further on."""
    return T.bind(description + T.uint64(units))


def multiply_rows(
    dtype: str,
    sums: Buffer,
    left: Expr,
    right: Expr,
    panels: tuple[Panels, Panels],
    first: Expr | None = None,
) -> None:
    """Start ``sums[64, n] = left right^T``, both read along their rows; n rows of the right matrix.

    With ``first`` (int32) the product is added to the sums unless that is 0.
    """
    a, b = panels
    for step in range(a.size // STEP):
        operands = add(left, a.along_row(step)), add(right, b.along_row(step))
        more = i32(1) if step else (i32(0) if first is None else first)
        call(f"wgmma_{SHORT[dtype]}_n{b.rows}", element(sums, 0), *operands, more)


def add_columns(sums: Buffer, weights: Buffer, right: Expr, panels: Panels) -> None:
    """Start ``sums[64, size] += weights right``: weights in registers, four words for each 16 rows of the matrix."""
    for step in range(panels.rows // STEP):
        words = [T.bind(load(weights, 4 * step + word)) for word in range(4)]
        place = add(right, step * STEP * ROW_BYTES // UNIT)
        call(f"wgmma_f16_rows_n{panels.size}", element(sums, 0), *words, place)


def hold(sums: Buffer) -> None:
    """Keep the compiler from moving uses of sums across this."""
    call(f"hold_{int(sums.shape[0])}", element(sums, 0))
