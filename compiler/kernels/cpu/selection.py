"""Selecting positions of the cache: a lightning indexer's scores, and the bits of the best ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS, SELECTION_PREFIX
from moec.compiler.kernels.cpu.cache_append import append, page_of
from moec.compiler.kernels.cpu.flash import page_scores
from moec.compiler.kernels.cpu.machine import Machine
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    build,
    div,
    either,
    i64,
    keep,
    load,
    loop,
    registers,
    scope,
    scratch,
    settle,
    store,
    when,
)
from moec.compiler.kernels.selection_arguments import IndexKeys, SelectionOperands, declare

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import SelectionSpec

HALF = 1 << 31
NOWHERE = -1
"""The rank of a position that does not exist: below all others."""


def selection(spec: SelectionSpec, *, lanes: int) -> tirx.PrimFunc:
    """The kernel ``selection_<selection>``: append the step's index keys to the cache, then select for each token.

    For its arguments see `moec.compiler.kernels.selection_arguments.declare`.
    """

    def body() -> None:
        operands = declare(spec, workspace=False)
        machine, appended = Machine(lanes), operands.appended
        append(IndexKeys(spec.dim, spec.dtype), machine, appended)
        emitter = _Selection(spec, machine, operands)
        with loop(operands.tokens, parallel=True) as token:
            emitter.token(token, keep(T.cast(load(appended.position, token), "int64") + i64(1)))

    return build(f"{SELECTION_PREFIX}{spec.name}", body)


@dataclass(frozen=True)
class _Selection:
    """The parts of one kernel while it is emitted."""

    spec: SelectionSpec
    machine: Machine
    operands: SelectionOperands

    def token(self, token: Expr, count: Expr) -> None:
        """Select from the ``count`` positions that a token may see."""
        either(
            count <= i64(self.spec.top_k),
            lambda: self._all(token, count),
            lambda: self._best(token, count),
        )

    def _all(self, token: Expr, count: Expr) -> None:
        with loop(self.operands.words) as word:
            bits = keep(T.max(T.min(count - word * i64(PAGE_TOKENS), i64(PAGE_TOKENS)), i64(0)))
            value = T.shift_left(i64(1), bits) - i64(1)
            store(self.operands.out, token * self.operands.words + word, T.cast(value, "int32"))

    def _best(self, token: Expr, count: Expr) -> None:
        with scope():
            self._best_by_rank(token, count)

    def _best_by_rank(self, token: Expr, count: Expr) -> None:
        pages = keep(div(count - i64(1), PAGE_TOKENS) + i64(1))
        ranks = scratch(pages * i64(PAGE_TOKENS), "int64")
        self._rank(token, count, pages, ranks)
        least = self._least(ranks, pages * i64(PAGE_TOKENS))
        equals = registers(2, "int64")
        store(equals, 0, i64(self.spec.top_k) - self._number(ranks, pages * i64(PAGE_TOKENS), least + i64(1)))
        bits = registers(2, "int64")
        with loop(self.operands.words) as word:
            store(bits, 0, i64(0))
            with when(word < pages), loop(PAGE_TOKENS) as bit:
                rank = keep(load(ranks, word * i64(PAGE_TOKENS) + bit))
                equal = T.And(rank.equal(least), load(equals, 0) > i64(0))
                chosen = settle(T.Select(T.Or(rank > least, equal), i64(1), i64(0)))
                with when(T.And(rank.equal(least), chosen > i64(0))):
                    store(equals, 0, load(equals, 0) - i64(1))
                store(bits, 0, load(bits, 0) + T.shift_left(chosen, bit))
            store(self.operands.out, token * self.operands.words + word, T.cast(load(bits, 0), "int32"))

    def _rank(self, token: Expr, count: Expr, pages: Expr, ranks: Buffer) -> None:
        """Scores of all positions, as whole numbers of the same order."""
        spec, appended = self.spec, self.operands.appended
        scaled = scratch(spec.heads * spec.dim)
        with loop(spec.heads * spec.dim) as number:
            value = load(self.operands.query, token * i64(spec.heads * spec.dim) + number)
            store(scaled, number, value * T.float32(spec.scaling))
        scores = scratch(spec.heads * PAGE_TOKENS)
        total = registers(1)
        sequence = keep(T.cast(load(appended.sequence, token), "int64"))
        with loop(pages) as number:
            page = page_of(appended.table, appended.width, sequence, number)
            start = keep(page * i64(PAGE_TOKENS * spec.dim))
            page_scores(
                self.machine, spec.dtype, spec.dim, scaled, i64(spec.heads), (appended.k_cache, start), scores
            )
            with loop(PAGE_TOKENS) as position:
                store(total, 0, T.float32(0.0))
                with loop(spec.heads) as head:
                    score = T.max(load(scores, head * i64(PAGE_TOKENS) + position), T.float32(0.0))
                    weight = load(self.operands.weight, token * i64(spec.heads) + head)
                    store(total, 0, load(total, 0) + weight * score)
                place = keep(number * i64(PAGE_TOKENS) + position)
                rank = T.Select(place < count, _rank_of(load(total, 0)), i64(NOWHERE))
                store(ranks, place, rank)

    def _least(self, ranks: Buffer, size: Expr) -> Expr:
        """The largest number that at least ``top_k`` ranks reach, bit by bit."""
        found = registers(2, "int64")
        store(found, 0, i64(0))
        with loop(32) as step:
            candidate = keep(load(found, 0) + T.shift_left(i64(1), i64(31) - step))
            with when(self._number(ranks, size, candidate) >= i64(self.spec.top_k)):
                store(found, 0, candidate)
        return keep(load(found, 0))

    def _number(self, ranks: Buffer, size: Expr, least: Expr) -> Expr:
        """How many ranks are ``least`` or more."""
        number = registers(2, "int64")
        store(number, 0, i64(0))
        with loop(size) as place:
            more = T.Select(load(ranks, place) >= least, i64(1), i64(0))
            store(number, 0, load(number, 0) + more)
        return keep(load(number, 0))


def _rank_of(value: Expr) -> Expr:
    """An int64 of ``0 .. 2**32 - 1`` that orders float32 values."""
    bits = keep(T.cast(T.reinterpret("int32", value), "int64"))
    return T.Select(bits >= i64(0), bits + i64(HALF), i64(-1) - bits)
