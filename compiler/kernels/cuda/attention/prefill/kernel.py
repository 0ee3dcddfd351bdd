"""Steps of many tokens: flash attention on tensor cores over the paged cache, into which the step was appended.

A block has 128 query rows and goes through the keys tile by tile; a warp has all columns of its rows. A tile's values
are copied while its scores are computed, the next tile's keys while its values are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cuda.attention.marks import any_left
from moec.compiler.kernels.cuda.attention.prefill.softmax import (
    Sums,
    add_bias,
    add_values,
    begin,
    score,
    weigh,
    write,
)
from moec.compiler.kernels.cuda.attention.rows import (
    Place,
    Rows,
    Segment,
    find_bounds,
    new_bounds,
    segment_at,
)
from moec.compiler.kernels.cuda.attention.tiles import Source, Tile, put_queries
from moec.compiler.kernels.cuda.primitives import (
    call,
    i32,
    launch,
    launch_next,
    registers,
    shared_dynamic,
    sync,
    wait_previous,
)
from moec.compiler.kernels.emit import Buffer, Expr, ceildiv, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cuda.attention.operands import Operands

ROWS = 128
NARROW = 128
"""Largest dimension for which a warp has 32 rows and a tile 64 keys."""


@dataclass(frozen=True)
class _Block:
    """What the parts of the kernel share."""

    spec: AttentionSpec
    operands: Operands
    place: Place
    queries: Tile
    keys: Tile
    values: Tile
    thread: Expr
    threads: int

    @property
    def lane(self) -> Expr:
        return self.thread % i32(32)


def prefill(spec: AttentionSpec, operands: Operands) -> None:
    """Launch the kernel."""
    narrow = spec.value_dim <= NARROW and spec.key_dim <= 192
    rows, warps, width = Rows(spec, ROWS), 4 if narrow else 8, 2 * PAGE_TOKENS if narrow else PAGE_TOKENS
    tiles = ceildiv(operands.tokens, rows.tokens)
    with launch((spec.kv_heads * rows.head_tiles, tiles), 32 * warps) as ((unit, late), thread):
        first = T.bind((T.cast(tiles, "int32") - i32(1) - late) * i32(rows.tokens))
        end = T.bind(T.min(first + i32(rows.tokens), T.cast(operands.tokens, "int32")))
        kv_head = T.bind(unit // i32(rows.head_tiles))
        place = Place(rows, first, end, kv_head, T.bind(unit % i32(rows.head_tiles) * i32(rows.heads)))
        block = _block(spec, operands, place, width, thread, 32 * warps)
        wait_previous()
        with when(any_left(operands.done, first, end, rows.tokens, T.bind(block.lane))):
            put_queries(place, operands, block.queries, thread, block.threads)
            sums = begin(spec, ROWS // (16 * warps), thread)
            cursor = registers(1, "int32")
            store(cursor, 0, first)
            with T.While(load(cursor, 0) < end):
                segment = segment_at(spec, operands, T.bind(load(cursor, 0)), end, T.bind(block.lane))
                _segment(block, sums, segment)
                store(cursor, 0, segment.end_token)
            launch_next()
            write(place, operands, sums)


def _block(
    spec: AttentionSpec, operands: Operands, place: Place, width: int, thread: Expr, threads: int
) -> _Block:
    def tiles(memory: Buffer | None) -> tuple[Tile, Tile, Tile]:
        queries = Tile(memory, 0, ROWS, spec.key_dim)
        keys = Tile(memory, queries.end, width, spec.key_dim)
        return queries, keys, Tile(memory, keys.end, width, spec.value_dim)

    memory = shared_dynamic(tiles(None)[2].end)
    return _Block(spec, operands, place, *tiles(memory), thread, threads)


def _segment(block: _Block, sums: Sums, segment: Segment) -> None:
    """Attend to all keys that tokens of one sequence see."""
    spec, width, operands = block.spec, block.keys.rows, block.operands
    keys = Source(operands.k_cache, spec.kv_heads, spec.key_dim, operands.table)
    value_size = spec.key_dim if spec.latent else spec.value_dim
    values = Source(operands.v_cache, spec.kv_heads, value_size, operands.table)
    bounds = new_bounds(spec, 2 * sums.tiles)
    find_bounds(block.place, segment, bounds, sums.rows)
    pages, following = (registers(width // PAGE_TOKENS, "int32") for _ in range(2))
    lowest, highest = T.bind(segment.first // i32(width)), T.bind(segment.last // i32(width))
    keys.read_pages(following, segment, lowest, width)

    def copy(source: Source, target: Tile, held: Buffer, tile: Expr) -> None:
        source.copy(target, held, block.place.kv_head, segment, tile, block.thread, block.threads)
        call("copy_commit")

    copy(keys, block.keys, following, lowest)
    call("copy_wait", i32(0))
    sync()
    with T.serial(i32(0), highest - lowest + i32(1)) as step:
        tile = T.bind(lowest + step)
        for number in range(width // PAGE_TOKENS):
            store(pages, number, load(following, number))
        copy(values, block.values, pages, tile)
        keys.read_pages(following, segment, tile + i32(1), width)
        scores = score(spec, sums, block.queries, block.keys)
        call("copy_wait", i32(0))
        sync()
        with when(tile < highest):
            copy(keys, block.keys, following, T.bind(tile + i32(1)))
        if operands.bias is not None:
            add_bias(block.place, operands.bias, sums, scores, bounds, T.bind(tile * i32(width)))
        whole = T.bind(_unmasked(block, segment, tile))
        weigh(spec, sums, scores, bounds, T.bind(tile * i32(width)), whole)
        add_values(spec, sums, scores, block.values)
        call("copy_wait", i32(0))
        sync()


def _unmasked(block: _Block, segment: Segment, tile: Expr) -> Expr:
    """Whether all rows see all of a tile."""
    width = i32(block.keys.rows)
    place = block.place
    whole = T.And(segment.first_token == place.first_token, segment.end_token == place.end_token)
    inside = T.And(tile * width >= segment.last_first, (tile + i32(1)) * width <= segment.sure + i32(1))
    return T.And(whole, inside)
