"""Relative position biases: what is added to a score for the distance between key and query."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.operands import LOG2E
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import Buffer, Expr, load

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec


def bias_row(spec: AttentionSpec, head: Expr) -> Expr:
    """Where the table has distance 0 for a query head, int32; a head that there is not gets that of the last."""
    inside = T.min(head, i32(spec.query_heads - 1))
    return T.bind(inside * i32(2 * spec.bias_reach + 1) + i32(spec.bias_reach))


def bias_of(spec: AttentionSpec, table: Buffer, row: Expr, distance: Expr) -> Expr:
    """What the exponent of 2 of a score is raised by; ``distance`` is the key's position less the query's, int32."""
    reach = i32(spec.bias_reach)
    near = T.bind(T.max(T.int32(0) - reach, T.min(distance, reach)))
    return load(table, T.cast(row + near, "int64")) * T.float32(LOG2E)
