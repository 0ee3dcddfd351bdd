"""Where the keys of a token lie that is decoded: in the cache, and among the step's own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.operands import Operands, first_seen, settled
from moec.compiler.kernels.cuda.primitives import i32, registers, value
from moec.compiler.kernels.emit import Expr, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec


@dataclass(frozen=True)
class Where:
    """What a block knows about its token (int32 unless said otherwise)."""

    token: Expr
    head: Expr
    """Key head."""
    table: Expr
    """Where the sequence's pages start in the page table, int64."""
    position: Expr
    first: Expr
    """First position that is seen."""
    base: Expr
    """Position of the sequence's first token in this step: what is before it lies in the cache."""
    step_first: Expr
    """Number of that token in the step."""
    tile: Expr
    """Number of the first tile in the sequence."""
    cached: Expr
    """Tiles to read from the cache; the tile after them is the step's own tokens, where there are keys of those."""
    tiles: Expr
    """All tiles."""


def locate(spec: AttentionSpec, operands: Operands, token: Expr, head: Expr, lane: Expr, width: int) -> Where:
    """Where the token's keys are: in the cache up to its sequence's first token in this step.

    Tiles are of ``width`` positions. All lanes of a warp take part.
    """
    sequence = T.bind(load(operands.sequence, token))
    position = T.bind(load(operands.position, token))
    if spec.cross:
        return _locate_source(operands, token, head, sequence, position, width)
    same = registers(1, "int32")
    store(same, 0, i32(0))
    with when(lane <= token):
        store(same, 0, T.cast(load(operands.sequence, lane) == sequence, "int32"))
    own = value("uint32", "ballot", load(same, 0) != i32(0))
    count = value("int32", "count_bits", own)
    base = settled(position - count + i32(1))
    first = settled(first_seen(spec, position))
    tile = settled(first // i32(width))
    cached = settled(T.Select(base > first, (base + i32(width - 1)) // i32(width) - tile, i32(0)))
    table = T.bind(T.cast(sequence, "int64") * operands.width)
    step_first = settled(token - count + i32(1))
    return Where(token, head, table, position, first, base, step_first, tile, cached, T.bind(cached + i32(1)))


def _locate_source(
    operands: Operands, token: Expr, head: Expr, sequence: Expr, last: Expr, width: int
) -> Where:
    """Where the keys of another sequence are: all of them in the cache, up to position ``last``."""
    base = settled(last + i32(1))
    tiles = settled((base + i32(width - 1)) // i32(width))
    table = T.bind(T.cast(sequence, "int64") * operands.width)
    return Where(token, head, table, last, i32(0), base, token, i32(0), tiles, tiles)
