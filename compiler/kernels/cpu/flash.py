"""One page of keys and values against a block of query rows: the inner step of flash attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cpu.dot import Columns, Rows, add_lanes, dot, max_lanes
from moec.compiler.kernels.cpu.math import VectorMath
from moec.compiler.kernels.cpu.numeric import widen
from moec.compiler.kernels.cpu.tiling import tiles
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    div,
    i64,
    keep,
    load,
    loop,
    registers,
    scratch,
    settle,
    splat,
    store,
)

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cpu.machine import Machine

LOWEST = -3.0e38
"""A score that no key has; a finite one, so that differences of it are numbers."""

KEYS_AHEAD = 128
"""Cache lines before a key that memory is asked for it, where few queries meet it."""


@dataclass(frozen=True)
class Block:
    """The state of a block of query rows: online softmax over the pages seen so far."""

    query: Buffer
    """[rows, key_dim], scaled."""
    sums: Buffer
    """[rows, value_dim], relative to ``largest``."""
    largest: Buffer
    """[rows]"""
    total: Buffer
    """[rows], the softmax's denominator relative to ``largest``."""
    scores: Buffer
    """[rows, PAGE_TOKENS], then the weights."""


def new_block(rows: int, spec: AttentionSpec) -> Block:
    """Scratch for blocks of up to ``rows`` rows."""
    sizes = (spec.key_dim, spec.value_dim, 1, 1, PAGE_TOKENS)
    return Block(*(scratch(rows * size) for size in sizes))


@dataclass(frozen=True)
class Page:
    """Where a page lies, and which of its positions exist."""

    keys: Buffer
    key_start: Expr
    values: Buffer
    value_start: Expr
    value_stride: int
    valid: Expr
    """Positions of the page that have been written."""


def page_scores(
    machine: Machine,
    dtype: str,
    depth: int,
    queries: Buffer,
    rows: Expr,
    keys: tuple[Buffer, Expr],
    scores: Buffer,
) -> None:
    """Emit ``scores[row, position] = queries[row] . keys[position]`` for the positions of a page.

    Args:
        machine: whose vectors are used.
        dtype: of the keys.
        depth: entries of a query and a key.
        queries: float32 ``[rows, depth]``.
        rows: of queries.
        keys: a buffer, and the element of it with which the page begins.
        scores: ``[rows, PAGE_TOKENS]``.
    """
    buffer, start = keys

    def tile(positions: list[Expr], columns: list[Expr]) -> None:
        stored = Rows(buffer, dtype, [keep(start + p * i64(depth)) for p in positions])
        asked = Columns(queries, [keep(c * i64(depth)) for c in columns])
        ahead = (KEYS_AHEAD,) if len(positions) == 1 else ()
        for position, row_sums in zip(
            positions, dot(stored, asked, depth, machine, ahead=ahead), strict=True
        ):
            for column, value in zip(columns, row_sums, strict=True):
                store(scores, column * i64(PAGE_TOKENS) + position, value)

    tiles(PAGE_TOKENS, rows, machine, lambda positions, _often: partial(tile, positions))


class Flash:
    """Emits the steps for one attention."""

    def __init__(self, spec: AttentionSpec, machine: Machine) -> None:
        self.spec, self.machine = spec, machine
        self.math = VectorMath(machine.lanes)

    def weigh(
        self, block: Block, rows: Expr, page: Page, first: Buffer, last: Buffer, selected: Buffer | None
    ) -> None:
        """Take a page whose scores are there into the block's state.

        Row r sees its positions ``first[r] .. last[r]``, and of these only those whose bit is set in ``selected[r]``
        (int64), where there is such a thing.
        """
        with loop(rows) as row:
            bits = None if selected is None else load(selected, row)
            self._softmax(block, row, load(first, row), load(last, row), bits)
        self._values(block, rows, page)

    def score(self, block: Block, rows: Expr, page: Page) -> None:
        """Products of the block's queries with a page's keys."""
        spec, keys = self.spec, (page.keys, page.key_start)
        page_scores(self.machine, spec.dtype, spec.key_dim, block.query, rows, keys, block.scores)

    def _softmax(self, block: Block, row: Expr, first: Expr, last: Expr, bits: Expr | None) -> None:
        """Scores to weights; rescale what the row has summed where its largest score grew."""
        lanes, math = self.machine.lanes, self.math
        start = keep(row * i64(PAGE_TOKENS))
        # One unsigned comparison tells whether first <= number <= last.
        first, seen = settle(T.cast(first, "int32")), settle(T.cast(last - first, "uint32"))
        chosen = None if bits is None else settle(T.cast(bits, "int32"))
        vectors, masks = [], []
        for offset in range(0, PAGE_TOKENS, lanes):
            number = T.Ramp(T.int32(offset), T.int32(1), lanes) - T.Broadcast(first, lanes)
            mask = T.cast(number, f"uint32x{lanes}") <= T.Broadcast(seen, lanes)
            if chosen is not None:
                places = T.Ramp(T.int32(offset), T.int32(1), lanes)
                bit = T.bitwise_and(
                    T.shift_right(T.Broadcast(chosen, lanes), places), T.Broadcast(T.int32(1), lanes)
                )
                mask = T.And(mask, bit > T.Broadcast(T.int32(0), lanes))
            score = self._capped(load(block.scores, start + i64(offset), lanes))
            masks.append(mask)
            vectors.append(settle(T.Select(mask, score, math.constant(LOWEST))))
        before = keep(load(block.largest, row))
        highest = vectors[0]
        for vector in vectors[1:]:
            highest = T.max(highest, vector)
        largest = settle(T.max(before, max_lanes(highest, lanes)))
        weights = [
            settle(T.Select(mask, math.exp(vector - splat(largest, lanes)), math.constant(0.0)))
            for mask, vector in zip(masks, vectors, strict=True)
        ]
        total = weights[0]
        for position, weight in enumerate(weights):
            store(block.scores, start + i64(position * lanes), weight, lanes)
            total = weight if position == 0 else total + weight
        shrink = settle(VectorMath(1).exp(before - largest))
        store(block.largest, row, largest)
        store(block.total, row, load(block.total, row) * shrink + add_lanes(total, lanes))
        self._scale(block.sums, row, shrink)

    def _capped(self, score: Expr) -> Expr:
        if not self.spec.softcap:
            return score
        cap = self.math.constant(self.spec.softcap)
        return cap * self.math.tanh(score / cap)

    def _scale(self, sums: Buffer, row: Expr, factor: Expr) -> None:
        lanes, size = self.machine.lanes, self.spec.value_dim
        start = keep(row * i64(size))
        with loop(size // lanes) as step:
            place = start + step * i64(lanes)
            store(sums, place, load(sums, place, lanes) * splat(factor, lanes), lanes)
        with loop(size % lanes) as step:
            place = start + step + i64(size - size % lanes)
            store(sums, place, load(sums, place) * factor)

    def _values(self, block: Block, rows: Expr, page: Page) -> None:
        """``sums[row] += weights[row] @ values``, in tiles of rows and vectors."""
        height = 4
        fours = keep(div(rows, height))
        with loop(fours) as tile:
            self._value_columns(block, [keep(tile * i64(height) + i64(r)) for r in range(height)], page)
        with loop(rows - fours * i64(height)) as rest:
            self._value_columns(block, [keep(fours * i64(height) + rest)], page)

    def _value_columns(self, block: Block, rows: list[Expr], page: Page) -> None:
        lanes, size = self.machine.lanes, self.spec.value_dim
        done = 0
        wide = 4 if lanes == 16 else 2
        for width, vectors in ((lanes, wide), (lanes, 1), (1, 1)):
            number = (size - done) // (width * vectors)
            with loop(number) as tile:
                self._value_tile(block, rows, page, i64(done) + tile * i64(width * vectors), vectors, width)
            done += number * width * vectors

    def _value_tile(
        self, block: Block, rows: list[Expr], page: Page, column: Expr, vectors: int, lanes: int
    ) -> None:
        size = i64(self.spec.value_dim)
        cells = [(row, vector) for row in rows for vector in range(vectors)]
        sums = registers(len(cells) * lanes)
        for cell, (row, vector) in enumerate(cells):
            place = row * size + column + i64(vector * lanes)
            store(sums, cell * lanes, load(block.sums, place, lanes), lanes)
        with loop(page.valid) as position:
            start = page.value_start + position * i64(page.value_stride) + column
            values = [
                keep(
                    widen(
                        page.values,
                        self.spec.dtype,
                        start + i64(v * lanes),
                        lanes,
                        native_f16=self.machine.native_f16,
                    )
                )
                for v in range(vectors)
            ]
            for r, row in enumerate(rows):
                weight = keep(splat(load(block.scores, row * i64(PAGE_TOKENS) + position), lanes))
                for v, value in enumerate(values):
                    place = (r * vectors + v) * lanes
                    store(sums, place, load(sums, place, lanes) + weight * value, lanes)
        for cell, (row, vector) in enumerate(cells):
            place = row * size + column + i64(vector * lanes)
            store(block.sums, place, load(sums, cell * lanes, lanes), lanes)
