"""A row of packed bytes as a lane of a warp reads it: 16 bytes of codes at a time, and what belongs to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.primitives import i32, value
from moec.compiler.kernels.emit import i64
from moec.formats.record import SCALE_BYTES
from moec.formats.rows import row_layout

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Expr
    from moec.formats.record import Format
    from moec.formats.rows import RowLayout

LOAD_BYTES = 16
LANES_A_ROW = 4
"""That read one row at a time."""


@dataclass(frozen=True)
class PackedRow:
    """Rows of a matrix with ``columns`` columns in a format."""

    kind: Format
    columns: int

    @cached_property
    def layout(self) -> RowLayout:
        """Where parts of a row begin."""
        return row_layout(self.kind, self.columns)

    @property
    def unit(self) -> int:
        """Columns in one load, which share a scale: 16 or 32."""
        return LOAD_BYTES * 8 // self.kind.bits

    @property
    def step(self) -> int:
        """Columns that four lanes load at once."""
        return LANES_A_ROW * self.unit

    def codes_at(self, row: Expr, column: Expr) -> Expr:
        """The address of a column's code, in the row at an address; int64."""
        return row + i64(T.truncdiv(column, i32(8 // self.kind.bits)))

    def scale_bits(self, row: Expr, column: Expr, valid: Expr) -> Expr:
        """The scale of a column as it is stored, uint32; zero where it is not valid."""
        size = SCALE_BYTES[self.kind.scale]
        group = T.truncdiv(column, i32(self.kind.group))
        place = row + i64(self.layout.scales_offset) + i64(group * i32(size))
        return value("uint32", f"fetch_{size}_if", place, valid)

    def scale(self, bits: Expr) -> Expr:
        """A stored scale as float32."""
        if self.kind.scale == "float16":
            return value("float32", "low_f16", bits)
        if self.kind.scale == "float32":
            return T.reinterpret("float32", bits)
        return T.reinterpret(
            "float32", T.Select(bits == T.uint32(0), T.uint32(0x400000), bits << T.uint32(23))
        )

    def minimum_bits(self, row: Expr, column: Expr, valid: Expr) -> Expr:
        """The minimum of a column as it is stored, uint32; zero where it is not valid."""
        group = T.truncdiv(column, i32(self.kind.group))
        place = row + i64(self.layout.zeros_offset) + i64(group * i32(2))
        return value("uint32", "fetch_2_if", place, valid)

    def minimum(self, bits: Expr) -> Expr:
        """A stored minimum as float32."""
        return value("float32", "low_f16", bits)

    def zero_bits(self, row: Expr, column: Expr, valid: Expr) -> Expr:
        """The zero point of a column, uint32."""
        group = T.truncdiv(column, i32(self.kind.group))
        return value("uint32", "fetch_1_if", row + i64(self.layout.zeros_offset) + i64(group), valid)
