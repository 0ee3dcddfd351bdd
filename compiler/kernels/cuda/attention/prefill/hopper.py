"""Steps of many tokens over the paged cache on Hopper GPUs: as `kernel`, with products of four warps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cuda.attention.marks import any_left
from moec.compiler.kernels.cuda.attention.prefill.softmax import Sums, begin, write
from moec.compiler.kernels.cuda.attention.prefill.warpgroups import (
    KEYS,
    ROWS,
    THREADS,
    Memory,
    allocate,
    attend,
)
from moec.compiler.kernels.cuda.attention.rows import (
    Place,
    Rows,
    Segment,
    find_bounds,
    new_bounds,
    segment_at,
)
from moec.compiler.kernels.cuda.attention.tiles import put_queries
from moec.compiler.kernels.cuda.many.panels import PANEL, PANEL_PIECES, ROW_BYTES, Panels
from moec.compiler.kernels.cuda.primitives import (
    call,
    element,
    i32,
    launch,
    launch_next,
    registers,
    wait_previous,
)
from moec.compiler.kernels.emit import Buffer, Expr, ceildiv, either, i64, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cuda.attention.operands import Operands

PIECE = 8
PASS_ROWS = THREADS // PANEL_PIECES
"""Rows of a panel that all threads copy at once: a page's."""
assert PASS_ROWS == PAGE_TOKENS


def prefill_hopper(spec: AttentionSpec, operands: Operands) -> None:
    """Launch the kernel; the step has been appended."""
    rows = Rows(spec, ROWS)
    tiles = ceildiv(operands.tokens, rows.tokens)
    with launch((spec.kv_heads * rows.head_tiles, tiles), THREADS) as ((unit, late), thread):
        first = T.bind((T.cast(tiles, "int32") - i32(1) - late) * i32(rows.tokens))
        end = T.bind(T.min(first + i32(rows.tokens), T.cast(operands.tokens, "int32")))
        kv_head = T.bind(unit // i32(rows.head_tiles))
        place = Place(rows, first, end, kv_head, T.bind(unit % i32(rows.head_tiles) * i32(rows.heads)))
        memory = allocate(spec, thread)
        wait_previous()
        with when(any_left(operands.done, first, end, rows.tokens, T.bind(thread % i32(32)))):
            put_queries(place, operands, memory.queries, thread, THREADS)
            sums = begin(spec, 1, thread)
            cursor = registers(1, "int32")
            store(cursor, 0, first)
            with T.While(load(cursor, 0) < end):
                segment = segment_at(spec, operands, T.bind(load(cursor, 0)), end, sums.lane)
                _segment(spec, operands, place, memory, sums, segment)
                store(cursor, 0, segment.end_token)
            launch_next()
            write(place, operands, sums)


def _segment(
    spec: AttentionSpec, operands: Operands, place: Place, memory: Memory, sums: Sums, segment: Segment
) -> None:
    """Attend to all keys that tokens of one sequence see."""
    bounds = new_bounds(spec, 2)
    find_bounds(place, segment, bounds, sums.rows)
    low, high = T.bind(segment.first // i32(KEYS)), T.bind(segment.last // i32(KEYS))
    attend(spec, memory, sums, PagedTiles(spec, operands, place, segment, memory.thread), (low, high), bounds)


@dataclass(frozen=True)
class PagedTiles:
    """Keys and values of one sequence in the cache; each panel of a page is one pass of all threads."""

    spec: AttentionSpec
    operands: Operands
    place: Place
    segment: Segment
    thread: Expr

    def first_position(self, tile: Expr) -> Expr:
        """Of its keys."""
        return tile * i32(KEYS)

    def whole(self, tile: Expr) -> Expr:
        """Whether all rows see all its keys."""
        segment, place = self.segment, self.place
        alone = T.And(segment.first_token == place.first_token, segment.end_token == place.end_token)
        begin = tile * i32(KEYS)
        seen = T.And(begin >= segment.last_first, begin + i32(KEYS) <= segment.sure + i32(1))
        return T.And(alone, seen)

    def copy_keys(self, tile: Expr, target: Panels, stage: Expr) -> None:
        """Start to copy a tile's keys; ``stage`` is the byte offset from ``target``."""
        self._copy(self.operands.k_cache, self.spec.key_dim, tile, target, stage)

    def copy_values(self, tile: Expr, target: Panels, stage: Expr) -> None:
        """Start to copy a tile's values."""
        row = self.spec.key_dim if self.spec.latent else self.spec.value_dim
        self._copy(self.operands.v_cache, row, tile, target, stage)

    def _copy(self, cache: Buffer, row_size: int, tile: Expr, target: Panels, stage: Expr) -> None:
        segment = self.segment
        begin = T.bind(tile * i32(KEYS))
        whole = T.And(begin >= segment.first, begin + i32(KEYS - 1) <= segment.last)
        pages = [self._page(tile, number, row_size) for number in range(KEYS // PAGE_TOKENS)]

        def copy(checked: bool) -> None:
            row, piece = T.bind(self.thread // i32(PANEL_PIECES)), T.bind(self.thread % i32(PANEL_PIECES))
            inside = T.bind(i64(row * i32(row_size) + piece * i32(PIECE)))
            place = T.bind(target.at(row, piece) + stage)
            for number, page in enumerate(pages):
                position = T.bind(begin + i32(number * PAGE_TOKENS) + row)
                valid = T.bind(T.And(position >= segment.first, position <= segment.last))
                for panel in range(target.size // PANEL):
                    offset = panel * target.panel_bytes + number * PASS_ROWS * ROW_BYTES
                    arguments = (
                        element(target.memory, place + i32(offset)),
                        element(cache, page + inside + i64(panel * PANEL)),
                    )
                    if checked:
                        call("copy_async_16_if", *arguments, valid)
                    else:
                        call("copy_async_16", *arguments)

        either(whole, lambda: copy(False), lambda: copy(True))

    def _page(self, tile: Expr, number: int, row_size: int) -> Expr:
        """Where a page's rows of the block's head begin, in elements; pages are those that the segment has."""
        segment = self.segment
        wanted = tile * i32(KEYS // PAGE_TOKENS) + i32(number)
        lowest, highest = segment.first // i32(PAGE_TOKENS), segment.last // i32(PAGE_TOKENS)
        inside = T.bind(T.max(lowest, T.min(wanted, highest)))
        page = load(self.operands.table, segment.table + i64(inside))
        row = i64(page) * i64(self.spec.kv_heads) + i64(self.place.kv_head)
        return T.bind(row * i64(PAGE_TOKENS * row_size))
