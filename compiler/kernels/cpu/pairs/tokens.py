"""A dense product of many tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.pairs.strip import SPAN, Results, Strip, Strips
from moec.compiler.kernels.cpu.pairs.vectors import rounded
from moec.compiler.kernels.emit import Expr, ceildiv, div, i64, keep, load, loop, mod, scope

if TYPE_CHECKING:
    from moec.compiler.kernels.cpu.matrix import Lines, Matrix

EXACT_ROWS = 512
"""Weights of up to so many rows, which may be a router's, meet activations in float32: rounding could turn a choice."""
STRIP_ROWS = 48
"""Of the weight that a thread takes at a time."""
STRIP_BYTES = 1 << 19
"""Of the tokens' part of a span, which a thread keeps in its second-level cache."""


class PairTokens:
    """One product while it is emitted."""

    def __init__(self, matrix: Matrix, tokens: Expr, x: Lines, out: Lines, *, parallel: bool) -> None:
        self.matrix, self.tokens, self.x, self.out = matrix, tokens, x, out
        self.parallel = parallel

    def emit(self) -> None:
        """Everything."""
        matrix, tokens = self.matrix, self.tokens
        height = min(STRIP_ROWS, matrix.rows)
        blocks = -(-matrix.rows // height)
        chunk = STRIP_BYTES // (2 * min(SPAN, matrix.columns))
        chunks = keep(ceildiv(tokens, chunk))
        with scope():
            vectors = rounded(
                self.x.buffer,
                lambda number: self.x.start(div(number, tokens), mod(number, tokens)),
                matrix.columns,
                keep(tokens * i64(matrix.batch)),
                parallel=self.parallel,
            )
            with loop(chunks * i64(matrix.batch * blocks), parallel=self.parallel) as task, scope():
                row = keep(T.min(mod(task, blocks) * i64(height), i64(matrix.rows - height)))
                first = keep(mod(div(task, blocks), chunks) * i64(chunk))
                batch = keep(div(task, chunks * i64(blocks)))
                number = keep(batch * tokens + first)
                begin = keep((batch * i64(matrix.rows) + row) * i64(matrix.columns))
                strips = Strips(
                    matrix.weight,
                    [begin],
                    height,
                    matrix.columns,
                    keep(begin + i64(height * matrix.columns)),
                    lambda _, within: self._bias(batch, row + within),
                )
                results = Results(
                    self.out.buffer, lambda _, place: self.out.start(batch, first + place) + row
                )
                count = keep(T.min(i64(chunk), tokens - first))
                Strip(strips, vectors, lambda place: number + place, count, results).emit()

    def _bias(self, batch: Expr, row: Expr) -> Expr | None:
        if self.matrix.bias is None:
            return None
        return load(self.matrix.bias, batch * i64(self.matrix.rows) + row)
