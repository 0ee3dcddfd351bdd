"""Query rows of a block: pairs of a token and one of the query heads that share a key head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.operands import Operands, first_seen
from moec.compiler.kernels.cuda.primitives import i32, registers, value
from moec.compiler.kernels.emit import Buffer, Expr, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec


@dataclass(frozen=True)
class Rows:
    """How ``count`` rows are filled: row ``r`` is token ``r // heads``, head ``r % heads`` of the block."""

    spec: AttentionSpec
    count: int

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.spec.query_heads // self.spec.kv_heads

    @property
    def heads(self) -> int:
        """Query heads of a block."""
        return min(self.group, self.count)

    @property
    def head_tiles(self) -> int:
        """Blocks that share a key head's query heads."""
        return -(-self.group // self.heads)

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return self.count // self.heads


@dataclass(frozen=True)
class Place:
    """Which rows a block has (all int32)."""

    rows: Rows
    first_token: Expr
    end_token: Expr
    kv_head: Expr
    first_head: Expr
    """First query head, counted within the key head's group."""

    def token(self, row: Expr) -> Expr:
        """The step's token of a row; there may be none such."""
        return T.bind(self.first_token + row // i32(self.rows.heads))

    def exists(self, row: Expr, token: Expr) -> Expr:
        """Whether a row has a token and a head."""
        inside = T.And(token < self.end_token, row < i32(self.rows.tokens * self.rows.heads))
        if self.rows.head_tiles == 1:
            return inside
        return T.And(inside, self.first_head + row % i32(self.rows.heads) < i32(self.rows.group))

    def head(self, row: Expr) -> Expr:
        """The query head of a row."""
        return T.bind(self.kv_head * i32(self.rows.group) + self.first_head + row % i32(self.rows.heads))


@dataclass(frozen=True)
class Segment:
    """A block's tokens of one sequence (all int32 but the table)."""

    first_token: Expr
    end_token: Expr
    table: Expr
    """Where the sequence's pages start in the page table, int64."""
    position: Expr
    """Of the first token."""
    last: Expr
    """The last position that the last token sees."""
    sure: Expr
    """The last position that all of them see."""
    first: Expr
    """The first position that one of them sees."""
    last_first: Expr
    """The first position that the last of them sees."""


def segment_at(spec: AttentionSpec, operands: Operands, token: Expr, end: Expr, lane: Expr) -> Segment:
    """The tokens from ``token`` on, and before ``end``, that are of the same sequence; at most 128."""
    sequence = T.bind(load(operands.sequence, token))
    stop = registers(1, "int32")
    store(stop, 0, end)
    with when(load(operands.sequence, end - i32(1)) != sequence):
        for start in (96, 64, 32, 0):
            number = T.bind(token + lane + i32(start))
            other = registers(1, "int32")
            store(other, 0, i32(0))
            with when(number < end):
                store(other, 0, T.cast(load(operands.sequence, number) != sequence, "int32"))
            others = value("uint32", "ballot", load(other, 0) != i32(0))
            with when(others != T.uint32(0)):
                lowest = (others & (T.uint32(0) - others)) - T.uint32(1)
                store(stop, 0, token + i32(start) + value("int32", "count_bits", lowest))
    found = T.bind(load(stop, 0))
    position = T.bind(load(operands.position, token))
    table = T.bind(T.cast(sequence, "int64") * operands.width)
    if not spec.causal:
        last = T.bind(load(operands.last, token))
        return Segment(token, found, table, position, last, last, i32(0), i32(0))
    last = T.bind(position + found - token - i32(1))
    first = first_seen(spec, position)
    return Segment(token, found, table, position, last, position, first, first_seen(spec, last))


@dataclass(frozen=True)
class Bounds:
    """For some rows the first and the last position that they see of the segment at hand; none where last < first."""

    first: Buffer
    last: Buffer
    position: Buffer | None = None
    """Of the rows' tokens; only where scores have a bias."""


def new_bounds(spec: AttentionSpec, rows: int) -> Bounds:
    """Registers for so many rows of a lane."""
    position = registers(rows, "int32") if spec.bias_reach else None
    return Bounds(registers(rows, "int32"), registers(rows, "int32"), position)


def find_bounds(place: Place, segment: Segment, bounds: Bounds, rows: list[Expr]) -> None:
    """Set the bounds of rows for a segment."""
    for number, row in enumerate(rows):
        token = place.token(row)
        inside = T.And(token >= segment.first_token, token < segment.end_token)
        position = T.bind(segment.position + token - segment.first_token)
        if bounds.position is not None:
            store(bounds.position, number, position)
        last = position if place.rows.spec.causal else segment.last
        store(bounds.first, number, first_seen(place.rows.spec, last))
        store(bounds.last, number, T.Select(inside, last, i32(-1)))
