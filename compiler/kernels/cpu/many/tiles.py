"""Tiles of activations: as many tokens as a vector has lanes, column after column."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from moec.compiler.kernels.cpu.short_codes import steps_of
from moec.compiler.kernels.emit import Buffer, Expr, i64, scratch
from moec.formats import format_of
from moec.formats.rows import RowLayout, row_layout

if TYPE_CHECKING:
    from moec.compiler.kernels.cpu.machine import Machine
    from moec.formats.record import Format


@dataclass(frozen=True)
class Depth:
    """The summed dimension of a product with rows of a format."""

    kind: Format
    columns: int
    machine: Machine

    @cached_property
    def layout(self) -> RowLayout:
        """Of a row."""
        return row_layout(self.kind, self.columns)

    @property
    def padded(self) -> int:
        """Columns with those that fill the last block of codes up."""
        return self.layout.padded

    @property
    def groups(self) -> int:
        """Of a row."""
        return self.layout.groups


def depth_of(name: str, columns: int, machine: Machine) -> Depth | None:
    """Of rows of a format that are multiplied as integers; None of others, and of plain types."""
    kind = format_of(name)
    if kind is None or steps_of(kind, machine) is None:
        return None
    return Depth(kind, columns, machine)


@dataclass(frozen=True)
class Tiles:
    """N tiles, rounded to 16 bits with a scale for each group of the weights' columns (``rounding``)."""

    depth: Depth
    pairs: Buffer
    """int32 ``[N, padded / 2, lanes]``: the codes of two adjacent columns, the first in the low half."""
    scales: Buffer
    """``[N, G, lanes]``"""
    sums: Buffer | None
    """``[N, G, lanes]``, of the values of each group, for weights with minima."""


def new_tiles(depth: Depth, count: Expr) -> Tiles:
    """Room for ``count`` tiles in the workspace of this scope."""
    lanes = depth.machine.lanes
    size = count * i64(depth.groups * lanes)
    return Tiles(
        depth,
        scratch(count * i64(depth.padded // 2 * lanes), "int32"),
        scratch(size),
        scratch(size) if depth.kind.minima else None,
    )
