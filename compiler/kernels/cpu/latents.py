"""Heads that a cached latent stands for: their queries in terms of latents, and their results out of those of latents.

With A and B as in `moec.artifacts.model.LatentHeads`: ``q_nope . (A c) = (A^T q_nope) . c``, ``sum p (B c) = B (sum p
c)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.linear import emit_linear
from moec.compiler.kernels.cpu.matrix import Lines, Matrix
from moec.compiler.kernels.emit import (
    ALIGNMENT_BYTES,
    Buffer,
    Expr,
    div,
    i64,
    keep,
    load,
    loop,
    mod,
    store,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cpu.machine import Machine

FLOAT_BYTES = 4


def workspace(spec: AttentionSpec) -> tuple[int, int]:
    """Bytes of ``workspace``: once, and for each token of a step; both are 0 where there is none."""
    if spec.heads is None:
        return 0, 0
    return ALIGNMENT_BYTES, FLOAT_BYTES * spec.query_heads * (spec.key_dim + spec.value_dim)


@dataclass(frozen=True)
class LatentCall:
    """One call while it is emitted; T tokens (int64)."""

    spec: AttentionSpec
    machine: Machine
    tokens: Expr
    q: Buffer
    absorb: Buffer
    expand: Buffer
    """Not used: latents are attended to as they are."""
    value: Buffer
    workspace: Buffer
    out: Buffer

    def emit(self, attend: Callable[[Buffer, Buffer], None]) -> None:
        """Emit everything; ``attend(queries, results)`` emits the attention to latents."""
        spec, heads = self.spec, self.spec.heads
        assert heads is not None
        rows = keep(self.tokens * i64(spec.query_heads))
        queries = self._floats(i64(0), rows * i64(spec.key_dim))
        first = keep(rows * i64(FLOAT_BYTES * spec.key_dim) + i64(ALIGNMENT_BYTES - 1))
        aligned = keep(div(first, ALIGNMENT_BYTES) * i64(ALIGNMENT_BYTES))
        results = self._floats(aligned, rows * i64(spec.value_dim))
        count = spec.query_heads
        matrix = Matrix(self.absorb, heads.dtype, spec.value_dim, heads.nope_dim, count)
        self._product(matrix, (self.q, spec.query_dim), (queries, spec.key_dim))
        self._keep_shared(queries, rows)
        attend(queries, results)
        matrix = Matrix(self.value, heads.dtype, heads.value_dim, spec.value_dim, count)
        self._product(matrix, (results, spec.value_dim), (self.out, heads.value_dim))

    def _floats(self, start: Expr, size: Expr) -> Buffer:
        pointer = T.bind(T.address_of(tirx.BufferLoad(self.workspace, [start])))
        return T.decl_buffer((keep(size),), "float32", data=pointer, align=ALIGNMENT_BYTES)

    def _product(self, matrix: Matrix, x: tuple[Buffer, int], out: tuple[Buffer, int]) -> None:
        """A product for each head of rows of so many elements."""

        def lines(buffer: Buffer, size: int) -> Lines:
            heads = i64(self.spec.query_heads)
            return Lines(buffer, lambda head, token: (token * heads + head) * i64(size))

        emit_linear(self.machine, matrix, self.tokens, lines(*x), lines(*out))

    def _keep_shared(self, queries: Buffer, rows: Expr) -> None:
        """What meets the part of keys that heads share stays as it is."""
        spec = self.spec
        assert spec.heads is not None
        rope, nope = spec.key_dim - spec.value_dim, spec.heads.nope_dim
        with loop(rows * i64(rope)) as number:
            row, column = keep(div(number, rope)), keep(mod(number, rope))
            rotated = load(self.q, row * i64(spec.query_dim) + i64(nope) + column)
            store(queries, row * i64(spec.key_dim) + i64(spec.value_dim) + column, rotated)
