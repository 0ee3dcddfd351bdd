"""In which order activations lie in memory for products with packed weights.

A lane multiplies by 16 bytes of codes of a row: its *unit* of 32 or 16 columns. Four lanes have four units, a *step*;
each wants its own sums, as each may have its own scale. So of the eight columns of a tensor core's product, two belong
to each unit: one for each of the two numbers of 16 bits that an activation is (see ``few.stream.Split``), zero for the
other units. Lane ``(g, t)`` brings column g: of the unit of ``g / 2``, and only where that is t; the sums of a unit
come back to the lanes that hold its codes.

For a step, memory has ``loads`` lines of 128 bytes, each 16 bytes for each column g: those that one load brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.packed.rows import LANES_A_ROW, LOAD_BYTES
from moec.compiler.kernels.cuda.primitives import i32

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Expr
    from moec.formats.record import Format

LINE = 64
"""Elements of 16 bits in a line."""
PIECE = 8
"""Of them, what one load brings."""
QUAD = 4
"""Columns whose codes are one half of a piece: in the order 0, 2, 1, 3."""


@dataclass(frozen=True)
class OperandOrder:
    """The order for codes of 8 or 4 bits."""

    bits: int

    @classmethod
    def of(cls, kind: Format) -> OperandOrder:
        """That of a format."""
        return cls(kind.bits)

    @property
    def unit(self) -> int:
        """Columns of a lane."""
        return LOAD_BYTES * 8 // self.bits

    @property
    def step(self) -> int:
        """Columns of four lanes."""
        return LANES_A_ROW * self.unit

    @property
    def loads(self) -> int:
        """Lines of a step: 4 or 2."""
        return self.unit // PIECE

    def elements(self, columns: int) -> int:
        """16-bit elements of the activations of one token, two each, columns rounded up to whole steps."""
        return 2 * self.step * -(-columns // self.step)

    def quad(self, column: Expr, part: int) -> Expr:
        """Where four columns begin, the first a multiple of 4; ``part`` is 0 for the larger number, 1 for the rest."""
        unit, inside = T.truncdiv(column, i32(self.unit)), T.truncmod(column, i32(self.unit))
        step, lane = T.truncdiv(unit, i32(LANES_A_ROW)), T.truncmod(unit, i32(LANES_A_ROW))
        quad = T.truncdiv(inside, i32(QUAD))
        if self.bits == 4:  # low halves of the bytes, then high halves
            load, half = T.truncmod(quad, i32(4)), T.truncdiv(quad, i32(4))
        else:
            load, half = T.truncdiv(quad, i32(2)), T.truncmod(quad, i32(2))
        line = (step * i32(self.loads) + load) * i32(LINE)
        return line + (lane * i32(2) + i32(part)) * i32(PIECE) + half * i32(QUAD)

    def place(self, column: Expr, part: int) -> Expr:
        """Where one column lies."""
        inside = T.truncmod(column, i32(QUAD))
        turned = T.truncmod(inside, i32(2)) * i32(2) + T.truncdiv(inside, i32(2))
        return self.quad(column, part) + turned
