"""Scores as whole numbers of the same order, in the workspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cuda.primitives import call, element, i32, registers
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import Buffer, Expr, i64, load, store

if TYPE_CHECKING:
    from moec.compiler.kernels.selection_arguments import SelectionOperands

HALF = 1 << 31
NOWHERE = 0
"""The rank of a position that does not exist: below all others."""


@dataclass(frozen=True)
class Ranks:
    """Those of one token: a uint32 for each position, whole pages."""

    memory: Buffer
    start: Expr
    """int64."""

    @classmethod
    def of(cls, operands: SelectionOperands, row: Expr) -> Ranks:
        """Row ``row`` of the workspace."""
        assert operands.workspace is not None
        size = operands.words * i64(PAGE_TOKENS)
        rows = T.decl_buffer((size,), "uint32", data=operands.workspace.data)
        return cls(rows, settle(T.cast(row, "int64") * size))

    def put(self, position: Expr, count: Expr, score: Expr) -> None:
        """Store the rank of ``score``; of positions from ``count`` on that of none (int32)."""
        bits = settle(T.reinterpret("uint32", score))
        rank = T.Select(bits < T.uint32(HALF), bits + T.uint32(HALF), T.bitwise_not(bits))
        there = T.Select(position < count, rank, T.uint32(NOWHERE))
        store(self.memory, self.start + T.cast(position, "int64"), there)

    def get(self, position: Expr) -> Expr:
        """The rank at a position (int32)."""
        return settle(load(self.memory, self.start + T.cast(position, "int64")))

    def four(self, group: Expr, groups: Expr) -> list[Expr]:
        """The ranks at positions ``4 * group`` and the three behind it, or `NOWHERE` from group ``groups`` on."""
        words = registers(4, "uint32")
        inside = T.bind(self.start + T.cast(T.min(group, groups - i32(1)) * i32(4), "int64"))
        call("load_16_if", element(words, 0), element(self.memory, inside), T.bind(group < groups))
        return [T.bind(load(words, number)) for number in range(4)]


def pages_of(count: Expr) -> Expr:
    """Pages that hold ``count`` positions, int32."""
    return settle((count + i32(PAGE_TOKENS - 1)) // i32(PAGE_TOKENS))
