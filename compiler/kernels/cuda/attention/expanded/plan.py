"""Which tokens of a step see expanded keys, and where those lie: one block plans, from what is on the device.

To expand a position takes as much arithmetic as some 170 queries save that see it expanded. So a *run* of tokens of one
sequence is worth it when it is at least `LEAST_TOKENS` long, however long the context: shorter runs (decoded tokens
beside a prompt) attend to latents. Rows of expanded keys are numbered through all runs; a run's begin and end at
multiples of `ALIGNED`. Runs that would go beyond the last round are not chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cuda.attention.expanded.room import MOST_RUNS, ROWS, RUN_WORDS
from moec.compiler.kernels.cuda.attention.marks import LEFT
from moec.compiler.kernels.cuda.attention.operands import Operands, first_seen
from moec.compiler.kernels.cuda.block import Block
from moec.compiler.kernels.cuda.primitives import (
    i32,
    registers,
    shared,
    sync,
    value,
    wait_previous,
)
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import Expr, i64, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cuda.attention.expanded.room import Expanded

LEAST_TOKENS = 128
WIDTH = 64
"""Keys of a tile, where tensor cores are used warp by warp."""
ALIGNED = 128
"""Rows of expanded keys of a run begin and end at multiples of this, so that tiles are of one run."""
MOST_TOKENS = LEAST_TOKENS * MOST_RUNS
"""In larger steps nothing is expanded."""


@dataclass(frozen=True)
class Run:
    """A run of tokens, as kernels read it (int32)."""

    first: Expr
    """Its first token in the step."""
    end: Expr
    position: Expr
    """Of the first token."""
    sequence: Expr
    lowest: Expr
    """Position of its first expanded key."""
    row: Expr
    """Row of that key among those of all runs."""
    rows: Expr
    tile: Expr
    """Number of its first tile of query rows among those of all runs."""

    @property
    def last(self) -> Expr:
        """Position of the last token."""
        return self.position + self.end - self.first - i32(1)


def emit_plan(
    spec: AttentionSpec, operands: Operands, expanded: Expanded, rounds: Expr, thread: Expr
) -> None:
    """Emit what one block of `MOST_RUNS` threads does; ``rounds`` are all there can be."""
    run, length = _find_run(spec, operands, thread)
    wait_previous()
    block = Block(thread, MOST_RUNS)
    limit = T.bind(i32(expanded.capacity) * i32(rounds))
    wanted = settle(T.And(length >= i32(LEAST_TOKENS), run.rows <= limit))
    rows = settle(T.Select(wanted, run.rows, i32(0)))
    before, total = block.scan(T.cast(rows, "uint64"))
    row = settle(T.cast(before, "int32"))
    chosen = settle(T.And(wanted, row + rows <= limit))
    tiles = settle(T.Select(chosen, (length + i32(ROWS - 1)) // i32(ROWS), i32(0)))
    both = T.cast(tiles, "uint64") * T.uint64(1 << 32) + T.cast(T.cast(chosen, "int32"), "uint64")
    earlier, all_ = block.scan(both)
    _, done = block.scan(T.cast(T.Select(chosen, length, i32(0)), "uint64"))
    with when(chosen):
        number = T.bind(T.cast(earlier & T.uint64(0xFFFFFFFF), "int32"))
        tile = T.bind(T.cast(earlier >> T.uint64(32), "int32"))
        fields = (run.first, run.end, run.position, run.sequence, run.lowest, row, rows, tile)
        for place, field in enumerate(fields):
            store(expanded.runs, number * i32(RUN_WORDS) + i32(place), field)
    with when(thread == i32(0)):
        store(expanded.head, 0, T.cast(all_ & T.uint64(0xFFFFFFFF), "int32"))
        store(expanded.head, 1, T.cast(all_ >> T.uint64(32), "int32"))
        store(expanded.head, 2, T.min(T.cast(total, "int32"), limit))
        store(expanded.head, LEFT, i32(operands.tokens) - T.cast(done, "int32"))
    _mark_tokens(operands, expanded, thread, (run.first, run.end, T.cast(chosen, "int32")))


def _find_run(spec: AttentionSpec, operands: Operands, thread: Expr) -> tuple[Run, Expr]:
    """The run with token ``LEAST_TOKENS * thread``, and its length; 0 where an earlier thread has found it.

    A run that is long enough has such a token. Those of a sequence are consecutive, so its ends are found by halving.
    """
    tokens = T.bind(i32(operands.tokens))
    token = T.bind(thread * i32(LEAST_TOKENS))
    inside = T.bind(T.min(token, tokens - i32(1)))
    sequence = T.bind(load(operands.sequence, inside))
    first = _halve(i32(0), inside, lambda place: load(operands.sequence, place) != sequence)
    end = _halve(inside + i32(1), tokens, lambda place: load(operands.sequence, place) == sequence)
    mine = T.And(token < tokens, first > token - i32(LEAST_TOKENS))
    length = settle(T.Select(mine, end - first, i32(0)))
    position = T.bind(load(operands.position, first))
    lowest = T.bind(first_seen(spec, position) // i32(ALIGNED) * i32(ALIGNED))
    seen = position + end - first - lowest
    rows = T.bind((seen + i32(ALIGNED - 1)) // i32(ALIGNED) * i32(ALIGNED))
    return Run(first, end, position, sequence, lowest, i32(0), rows, i32(0)), length


def _halve(low: Expr, high: Expr, before: object) -> Expr:
    """The first place from ``low`` on, at most ``high``, that is not ``before``."""
    assert callable(before)
    bounds = registers(2, "int32")
    store(bounds, 0, low)
    store(bounds, 1, high)
    with T.While(load(bounds, 0) < load(bounds, 1)):
        middle = T.bind((load(bounds, 0) + load(bounds, 1)) // i32(2))
        is_before = T.bind(before(middle))
        low_then = T.bind(T.Select(is_before, middle + i32(1), load(bounds, 0)))
        high_then = T.bind(T.Select(is_before, load(bounds, 1), middle))
        store(bounds, 0, low_then)
        store(bounds, 1, high_then)
    return T.bind(load(bounds, 0))


def _mark_tokens(operands: Operands, expanded: Expanded, thread: Expr, own: tuple[Expr, Expr, Expr]) -> None:
    """Say of each token whether it is of a chosen run: then the run has one of the two threads' tokens beside it."""
    held = [shared(MOST_RUNS, "int32") for _ in own]
    for memory, item in zip(held, own, strict=True):
        store(memory, thread, item)
    sync()
    tokens = T.bind(i32(operands.tokens))
    with T.serial(i32(0), (tokens + i32(MOST_RUNS - 1)) // i32(MOST_RUNS)) as step:
        token = T.bind(step * i32(MOST_RUNS) + thread)
        with when(token < tokens):
            mark = registers(1, "int32")
            store(mark, 0, i32(0))
            for side in range(2):
                near = T.bind(T.min(token // i32(LEAST_TOKENS) + i32(side), i32(MOST_RUNS - 1)))
                first, end = T.bind(load(held[0], near)), T.bind(load(held[1], near))
                # The thread that found the run first is the one that knows whether it is chosen.
                finder = T.bind((first + i32(LEAST_TOKENS - 1)) // i32(LEAST_TOKENS))
                there = T.And(T.And(first <= token, token < end), finder <= near)
                with when(T.bind(there)):
                    store(mark, 0, load(held[2], finder))
            store(expanded.chosen, T.cast(token, "int64"), load(mark, 0))


def counted(expanded: Expanded, place: int) -> Expr:
    """0: runs, 1: tiles of query rows, 2: rows of keys, of all chosen runs."""
    return T.bind(load(expanded.head, i32(place)))


def find(expanded: Expanded, lane: Expr, place: Expr, word: int) -> Run:
    """The run with the largest ``word`` (`RUN_ROW` or `RUN_TILE`) up to ``place``; all lanes of a warp take part."""
    count = counted(expanded, 0)
    found = registers(1, "int32")
    store(found, 0, i32(0))
    with T.serial(i32(0), (count + i32(31)) // i32(32)) as step:
        number = T.bind(step * i32(32) + lane)
        near = T.bind(T.min(number, count - i32(1)))
        starts = load(expanded.runs, near * i32(RUN_WORDS) + i32(word)) <= place
        begun = value("uint32", "ballot", T.bind(T.And(number < count, starts)))
        store(found, 0, load(found, 0) + value("int32", "count_bits", begun))
    start = T.bind((load(found, 0) - i32(1)) * i32(RUN_WORDS))
    return Run(*(T.bind(load(expanded.runs, start + i32(field))) for field in range(RUN_WORDS)))


RUN_ROW, RUN_TILE = 5, 7
"""Words of a run."""


def rounds_of(operands: Operands, expanded: Expanded, most: int) -> Expr:
    """Rounds that may be needed: one sequence's context can be all pages of a row of the page table; int64."""
    rows = operands.width * i64(PAGE_TOKENS) + i64(ALIGNED)
    needed = tirx.truncdiv(rows + expanded.capacity - i64(1), expanded.capacity)
    return T.bind(T.min(needed, i64(most)))
