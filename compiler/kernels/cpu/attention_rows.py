"""The query rows of a task of attention: a token's head each, from its scaled query to its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cpu.flash import LOWEST, Block
from moec.compiler.kernels.emit import Buffer, Expr, div, i64, keep, load, loop, mod, splat, store

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cpu.machine import Machine

TASK_HEADS = 8
"""Query heads of one task, at most."""


@dataclass(frozen=True)
class TokenPlaces:
    """Of each token, its row of the page table, its position, and the last position that it sees."""

    sequence: Buffer
    position: Buffer
    last: Buffer


@dataclass(frozen=True)
class Run:
    """Adjacent tokens of one sequence, and the heads of a task."""

    sequence: Expr
    first_token: Expr
    tokens: Expr
    kv_head: Expr
    first_head: Expr


@dataclass(frozen=True)
class QueryRows:
    """Rows of queries and results; what belongs to one is told by its head and its token."""

    spec: AttentionSpec
    machine: Machine
    q: Buffer
    each: TokenPlaces
    selection: tuple[Buffer, Expr] | None
    """And its words a token."""
    sinks: Buffer | None
    bias: Buffer | None
    out: Buffer

    @property
    def heads(self) -> int:
        """Query heads of one task."""
        group = self.spec.query_heads // self.spec.kv_heads
        return -(-group // -(-group // TASK_HEADS))

    def selected(self, run: Run, row: Expr, page: Expr) -> Expr:
        """The bits of a page for a row."""
        assert self.selection is not None
        buffer, words = self.selection
        token = run.first_token + div(row, self.heads)
        return integer(buffer, token * words + page)

    def add_bias(self, run: Run, rows: Expr, block: Block, start: Expr) -> None:
        """Add to the scores of a page, which begins at position ``start``, what its distances have, if anything."""
        if self.bias is None:
            return
        reach = i64(self.spec.bias_reach)
        with loop(rows) as row:
            head, _ = self._row(run, row)
            position = integer(self.each.position, run.first_token + div(row, self.heads))
            table = keep(head * i64(2 * self.spec.bias_reach + 1) + reach)
            before = keep(start - position)
            scores = keep(row * i64(PAGE_TOKENS))
            with loop(PAGE_TOKENS) as number:
                distance = T.max(-reach, T.min(before + number, reach))
                added = load(self.bias, table + distance)
                store(block.scores, scores + number, load(block.scores, scores + number) + added)

    def _row(self, run: Run, row: Expr) -> tuple[Expr, Expr]:
        """The head of a row, and its number among all rows of ``q`` and ``out``."""
        head = keep(run.first_head + mod(row, self.heads))
        token = run.first_token + div(row, self.heads)
        return head, keep(token * i64(self.spec.query_heads) + head)

    def begin(self, run: Run, row: Expr, block: Block) -> None:
        """Scale the query; an attention sink is a score with no value."""
        spec = self.spec
        head, place = self._row(run, row)

        def copy(offset: Expr, lanes: int) -> None:
            query = load(self.q, place * i64(spec.key_dim) + offset, lanes)
            store(block.query, row * i64(spec.key_dim) + offset, query * splat(spec.scaling, lanes), lanes)

        def clear(offset: Expr, lanes: int) -> None:
            store(block.sums, row * i64(spec.value_dim) + offset, splat(0.0, lanes), lanes)

        self._each(spec.key_dim, copy)
        self._each(spec.value_dim, clear)
        if self.sinks is None:
            store(block.largest, row, T.float32(LOWEST))
            store(block.total, row, T.float32(0.0))
        else:
            store(block.largest, row, load(self.sinks, head))
            store(block.total, row, T.float32(1.0))

    def finish(self, run: Run, row: Expr, block: Block) -> None:
        """Divide the weighted sum of values by the sum of weights: the result."""
        spec = self.spec
        _, place = self._row(run, row)
        scale = keep(T.float32(1.0) / load(block.total, row))

        def write(offset: Expr, lanes: int) -> None:
            value = load(block.sums, row * i64(spec.value_dim) + offset, lanes) * splat(scale, lanes)
            target = place * i64(spec.value_dim) + offset
            store(self.out, target, value, lanes)

        self._each(spec.value_dim, write)

    def _each(self, size: int, emit: Callable[[Expr, int], None]) -> None:
        """Whole vectors of a row, then what is left."""
        lanes = self.machine.lanes
        with loop(size // lanes) as step:
            emit(step * i64(lanes), lanes)
        with loop(size % lanes) as step:
            emit(step + i64(size - size % lanes), 1)


def integer(buffer: Buffer, place: Expr) -> Expr:
    """An element of a tensor of integers."""
    return T.cast(load(buffer, place), "int64")
