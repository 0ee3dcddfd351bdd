"""How a few tokens over latents are divided over blocks, and where what these make lies until it is put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.latents.block import Shape
from moec.compiler.kernels.cuda.attention.operands import Operands, settled
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS
from moec.compiler.kernels.cuda.primitives import MULTIPROCESSORS, i32
from moec.compiler.kernels.emit import Buffer, Expr, i64

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cuda.attention.where import Where

MOST_PARTS = 64
FEW_HEADS = 16
"""So many and fewer are cheap to divide over blocks of eight heads each: what a block does for a tile is short then."""


@dataclass(frozen=True)
class LatentPlan:
    """How a token is divided over blocks; all step's tokens together have some ``splits`` parts for a unit."""

    spec: AttentionSpec

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.spec.query_heads // self.spec.kv_heads

    @property
    def shape(self) -> Shape:
        """Of a block."""
        if self.group <= FEW_HEADS:
            return Shape(self.spec, 1, exact=True, across=4)
        return Shape(self.spec, 4, exact=True)

    @property
    def heads(self) -> int:
        """Query heads of a block."""
        return 8 * self.shape.row_tiles

    @property
    def head_tiles(self) -> int:
        """Blocks that share a key head's query heads."""
        return -(-self.group // self.heads)

    @property
    def splits(self) -> int:
        """The most blocks that share a context."""
        return max(1, min(MOST_PARTS, MULTIPROCESSORS // (self.spec.kv_heads * self.head_tiles)))

    @property
    def slots(self) -> int:
        """Results of a query head that are in the workspace at once."""
        return self.splits + FEW_TOKENS - 1

    @property
    def facts(self) -> int:
        """Where maxima and totals begin in the workspace, in floats."""
        return self.slots * self.spec.query_heads * self.spec.value_dim

    @property
    def workspace_bytes(self) -> int:
        """Partial results of the largest step that is decoded."""
        return 4 * (self.facts + 2 * self.slots * self.spec.query_heads)

    def parts(self, tokens: Expr) -> Expr:
        """Blocks that share a token's context, int32."""
        count = T.cast(tokens, "int32")
        return tirx.truncdiv(i32(self.splits - 1) + count, count)

    def active(self, where: Where, parts: Expr) -> Expr:
        """How many of them have something to do."""
        return settled(T.min(where.cached + i32(1), parts))


@dataclass(frozen=True)
class Part:
    """Which part of which result a block has."""

    number: Expr
    active: Expr
    slot: Expr
    first_head: Expr
    """In the block, of all query heads."""
    count: Expr
    """Heads of the block."""


def results(plan: LatentPlan, operands: Operands) -> Buffer:
    """The workspace as float32: sums of values ``[slots, Hq, Dv]``, then maximum and total ``[slots, Hq, 2]``."""
    assert operands.workspace is not None
    return T.decl_buffer((i64(plan.workspace_bytes // 4),), "float32", data=operands.workspace.data)
