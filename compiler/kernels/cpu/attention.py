"""Attention over the paged cache: one online softmax for prefill and decode, any ratio of query to key heads.

The step's own keys and values are put into their pages first. Then a task is a key head, some of its query heads, and
some adjacent tokens. Query rows of one sequence share what is read of the cache; scores of one page at a time exist,
never a matrix of tokens by context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.attention_arguments import Appended, Extents, attention_arguments
from moec.compiler.kernels.cpu.attention_rows import QueryRows, Run, TokenPlaces, integer
from moec.compiler.kernels.cpu.cache_append import append, page_of
from moec.compiler.kernels.cpu.flash import Block, Flash, Page, new_block
from moec.compiler.kernels.cpu.latents import LatentCall
from moec.compiler.kernels.cpu.machine import Machine
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    arguments,
    build,
    div,
    i64,
    keep,
    load,
    loop,
    mod,
    registers,
    scratch,
    store,
)

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import AttentionSpec

TASK_ROWS = 32
"""Query rows (tokens times heads) of one task, about."""
DECODE_TOKENS = 32
"""With fewer tokens than this a task has one token, so that there are enough tasks."""


def attention(spec: AttentionSpec, *, lanes: int, name: str | None = None) -> tirx.PrimFunc:
    """The kernel ``attention_<attention>``: append the step's keys and values to the cache, then attend.

    Its arguments: ``q [1, T, Hq, Dq]``, ``k [1, T, Hkv, Dk]``, ``v [1, T, Hkv, Dv]`` (not where latent),
    ``k_cache [pages, Hkv, P, Dk]``, ``v_cache [pages, Hkv, P, Dv]`` (not where latent), ``page_table [B, M]`` int32,
    ``token_sequence [T]`` int32, ``token_position [T]`` int32, ``token_last [T]`` int32 (where neither causal nor
    cross), ``selection [T, S]`` int32 (where the spec is selected; see ``SelectionStep``), ``sinks [Hq]`` (where the
    spec has them), ``bias [Hq, 2 * bias_reach + 1]`` (where it has one), the matrices
    of `moec.artifacts.steps.LatentWeights` and ``workspace`` uint8 (where it has heads), ``out [1, T, Hq, Dr]``. Dq and
    Dr are the spec's query_dim and result_dim. Tokens of one sequence are adjacent, in increasing position. P is
    ``PAGE_TOKENS``; T, B, M and the number of pages are symbolic; the caches are of the spec's dtype, matrices of the
    heads', all else is float32. See ``AttentionSpec`` for which positions a token sees.

    Where not causal, ``token_last`` has the last position that a token sees. Where cross, there are no ``k`` and ``v``,
    and nothing is appended: ``token_sequence`` has the source's row, ``token_position`` its last position.
    """
    machine = Machine(lanes)

    def body() -> None:
        extents = Extents.declare()
        declared = attention_arguments(spec, extents, workspace=spec.heads is not None)
        q, k, v, k_cache, v_cache, table, sequence, position, last, selected, sinks, bias, *more, out = (
            arguments(*declared)
        )
        tokens, width = extents.tokens, extents.width
        if not spec.cross:
            append(spec, machine, Appended(k, v, k_cache, v_cache, table, width, sequence, position, tokens))

        def attend(queries: Buffer, results: Buffer) -> None:
            pages = _Pages(k_cache, v_cache, table, width)
            each = TokenPlaces(sequence, position, position if last is None else last)
            chosen = None if selected is None else (selected, extents.words)
            rows = QueryRows(spec, machine, queries, each, chosen, sinks, bias, results)
            _Attention(spec, machine, _Call(rows, pages, tokens)).emit()

        if spec.heads is None:
            attend(q, out)
        else:
            absorb, expand, value, memory = more
            LatentCall(spec, machine, tokens, q, absorb, expand, value, memory, out).emit(attend)

    return build(name or f"attention_{spec.name}", body)


@dataclass(frozen=True)
class _Pages:
    """Where keys and values lie."""

    keys: Buffer
    values: Buffer | None
    table: Buffer
    width: Expr


@dataclass(frozen=True)
class _Call:
    rows: QueryRows
    pages: _Pages
    tokens: Expr


class _Attention:
    """The parts of one kernel while it is emitted."""

    def __init__(self, spec: AttentionSpec, machine: Machine, call: _Call) -> None:
        self.spec, self.machine, self.call = spec, machine, call
        self.flash = Flash(spec, machine)
        self.group = spec.query_heads // spec.kv_heads
        self.heads = call.rows.heads
        self.parts = -(-self.group // self.heads)
        self.block_tokens = max(1, TASK_ROWS // self.heads)

    def emit(self) -> None:
        """All tasks: heads outermost, so that threads with different heads have equal work in a prefill."""
        tokens = self.call.tokens
        step = keep(T.Select(tokens < i64(DECODE_TOKENS), i64(1), i64(self.block_tokens)))
        blocks = keep(div(tokens + step - i64(1), step))
        with loop(i64(self.spec.kv_heads * self.parts) * blocks, parallel=True) as task:
            heads = keep(div(task, blocks))
            kv_head = keep(div(heads, self.parts))
            part = T.min(mod(heads, self.parts) * i64(self.heads), i64(self.group - self.heads))
            first_head = keep(kv_head * i64(self.group) + part)
            first = keep(self._balanced(mod(task, blocks), blocks) * step)
            self._runs(first, keep(T.min(first + step, tokens)), kv_head, first_head)

    def _balanced(self, number: Expr, blocks: Expr) -> Expr:
        """Early and late blocks in turn: late ones see more of the context."""
        half = keep(div(number, 2))
        return keep(T.Select(mod(number, 2).equal(i64(0)), half, blocks - i64(1) - half))

    def _runs(self, first: Expr, end: Expr, kv_head: Expr, first_head: Expr) -> None:
        """Cut the tokens ``first .. end-1`` where the sequence changes."""
        block = new_block(self.block_tokens * self.heads, self.spec)
        count = 2 if self.call.rows.selection is None else 3
        limits = tuple(scratch(self.block_tokens * self.heads, "int64") for _ in range(count))
        cursor = registers(2, "int64")
        store(cursor, 0, first)
        with T.While(load(cursor, 0) < end):
            start = keep(load(cursor, 0))
            sequence = keep(integer(self.call.rows.each.sequence, start))
            store(cursor, 1, start + i64(1))
            with T.While(self._continues(load(cursor, 1), end, sequence)):
                store(cursor, 1, load(cursor, 1) + i64(1))
            run = Run(sequence, start, keep(load(cursor, 1) - start), kv_head, first_head)
            self._run(run, block, limits)
            store(cursor, 0, load(cursor, 1))

    def _continues(self, token: Expr, end: Expr, sequence: Expr) -> Expr:
        inside = T.min(token, end - i64(1))
        return T.And(token < end, integer(self.call.rows.each.sequence, inside).equal(sequence))

    def _run(self, run: Run, block: Block, limits: tuple[Buffer, ...]) -> None:
        rows_of = self.call.rows
        rows = keep(run.tokens * i64(self.heads))
        with loop(rows) as row:
            rows_of.begin(run, row, block)
        last = self.call.rows.each.last
        lowest = self._first_visible(keep(integer(last, run.first_token)))
        highest = keep(integer(last, run.first_token + run.tokens - i64(1)))
        first_page = keep(div(lowest, PAGE_TOKENS))
        with loop(div(highest, PAGE_TOKENS) - first_page + i64(1)) as number:
            page = keep(first_page + number)
            start = keep(page * i64(PAGE_TOKENS))
            with loop(rows) as row:
                place = keep(integer(last, run.first_token + div(row, self.heads)))
                store(limits[0], row, self._first_visible(place) - start)
                store(limits[1], row, place - start)
                if rows_of.selection is not None:
                    store(limits[2], row, rows_of.selected(run, row, page))
            valid = keep(T.min(i64(PAGE_TOKENS), highest - start + i64(1)))
            here = self._page(run, page, valid)
            self.flash.score(block, rows, here)
            rows_of.add_bias(run, rows, block, start)
            first, last, *bits = limits
            self.flash.weigh(block, rows, here, first, last, bits[0] if bits else None)
        with loop(rows) as row:
            rows_of.finish(run, row, block)

    def _first_visible(self, position: Expr) -> Expr:
        first = i64(0)
        if self.spec.window:
            first = T.max(first, position - i64(self.spec.window - 1))
        if self.spec.chunk:
            first = T.max(first, div(position, self.spec.chunk) * i64(self.spec.chunk))
        return keep(first)

    def _page(self, run: Run, number: Expr, valid: Expr) -> Page:
        spec, pages = self.spec, self.call.pages
        page = page_of(pages.table, pages.width, run.sequence, number)
        slot = keep((page * i64(spec.kv_heads) + run.kv_head) * i64(PAGE_TOKENS))
        keys = keep(slot * i64(spec.key_dim))
        if pages.values is None:
            return Page(pages.keys, keys, pages.keys, keys, spec.key_dim, valid)
        values = keep(slot * i64(spec.value_dim))
        return Page(pages.keys, keys, pages.values, values, spec.value_dim, valid)
