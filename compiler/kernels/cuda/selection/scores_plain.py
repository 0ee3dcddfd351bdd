"""An indexer's scores for any shape and type: a lane a position, a warp a page. Correct, and slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cuda.attention.operands import cache_row
from moec.compiler.kernels.cuda.primitives import LANES, i32, registers
from moec.compiler.kernels.cuda.selection.ranks import Ranks, pages_of
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.threads import read
from moec.compiler.kernels.emit import Expr, i64, load, loop, store
from moec.compiler.kernels.selection_arguments import IndexKeys

if TYPE_CHECKING:
    from moec.artifacts.model import SelectionSpec
    from moec.compiler.kernels.selection_arguments import SelectionOperands


@dataclass(frozen=True)
class PlainScores:
    """Scores of one token at a time, in float32."""

    spec: SelectionSpec
    operands: SelectionOperands
    thread: Expr

    def begin(self, _token: Expr) -> None:
        """Nothing is kept."""

    def rank(self, ranks: Ranks, token: Expr, count: Expr, first: Expr, step: Expr) -> None:
        """Rank ``count`` positions: pages ``first``, ``first + step`` and so on are this warp's (int32)."""
        spec, appended = self.spec, self.operands.appended
        lane = settle(tirx.truncmod(self.thread, i32(LANES)))
        sequence = settle(load(appended.sequence, token))
        keys = IndexKeys(spec.dim, spec.dtype)
        total, product = registers(1), registers(1)
        turns = (pages_of(count) - first + step - i32(1)) // step
        with T.serial(i32(0), T.max(turns, i32(0))) as turn:
            position = settle((first + turn * step) * i32(PAGE_TOKENS) + lane)
            inside = T.min(position, count - i32(1))
            key = settle(cache_row(appended, keys, sequence, inside, i32(0)) * i64(spec.dim))
            store(total, 0, T.float32(0))
            with loop(spec.heads) as head:
                store(product, 0, T.float32(0))
                row = T.bind(T.cast(token, "int64") * i64(spec.heads) + head)
                with loop(spec.dim) as d:
                    left = load(self.operands.query, row * i64(spec.dim) + d) * T.float32(spec.scaling)
                    right = read(appended.k_cache, spec.dtype, key + d)
                    store(product, 0, load(product, 0) + left * right)
                score = T.max(load(product, 0), T.float32(0))
                store(total, 0, load(total, 0) + load(self.operands.weight, row) * score)
            ranks.put(position, count, load(total, 0))
