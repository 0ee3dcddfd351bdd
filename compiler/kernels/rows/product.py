"""Products of a segment as one kernel computes them, together with the rows that lie before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moec.compiler.kernels.linear_shape import LinearShape
    from moec.compiler.kernels.rows.region import Region
    from moec.compiler.kernels.rows.stages import Key

VECTOR = 8
"""Columns that kernels of products take at a time."""


@dataclass(frozen=True)
class Product:
    """Products that share their input, and what the input is computed from."""

    shapes: tuple[LinearShape, ...]
    region: Region | None
    """What the kernel computes ``source`` from; ``None``: it reads it."""
    source: Key
    keeps: bool = False
    """Whether the region's outputs, the source among them, are results of the kernel."""

    @property
    def terms(self) -> int:
        """The most that one of the products takes."""
        return max(shape.terms for shape in self.shapes)

    @property
    def rounded_columns(self) -> int:
        """16-bit numbers of one token's input: all of the first terms, then of the second."""
        return self.terms * (-(-self.shapes[0].columns // VECTOR) * VECTOR)
