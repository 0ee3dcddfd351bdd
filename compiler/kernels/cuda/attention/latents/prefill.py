"""Steps of many tokens over latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.convert import clamped, floats_2
from moec.compiler.kernels.cuda.attention.latents.attend import attend
from moec.compiler.kernels.cuda.attention.latents.block import WIDTH, Block, Shape, begin, row_number
from moec.compiler.kernels.cuda.attention.marks import any_left
from moec.compiler.kernels.cuda.attention.operands import Operands, query_scale, store_results
from moec.compiler.kernels.cuda.attention.prefill.softmax import inverse_total
from moec.compiler.kernels.cuda.attention.rows import Bounds, Place, Rows, Segment, find_bounds, segment_at
from moec.compiler.kernels.cuda.attention.tiles import Source
from moec.compiler.kernels.cuda.primitives import (
    call,
    i32,
    launch,
    launch_next,
    pack,
    registers,
    sync,
    wait_previous,
    warp_sum,
)
from moec.compiler.kernels.emit import Expr, ceildiv, i64, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec

ROW_TILES = 4


def latent_prefill(spec: AttentionSpec, operands: Operands) -> None:
    """Launch the kernel; the step has been appended."""
    shape = Shape(spec, ROW_TILES, exact=False)
    rows = Rows(spec, shape.rows)
    tiles = ceildiv(operands.tokens, rows.tokens)
    with launch((spec.kv_heads * rows.head_tiles, tiles), shape.threads) as ((unit, late), thread):
        first = T.bind((T.cast(tiles, "int32") - i32(1) - late) * i32(rows.tokens))
        end = T.bind(T.min(first + i32(rows.tokens), T.cast(operands.tokens, "int32")))
        kv_head = T.bind(unit // i32(rows.head_tiles))
        place = Place(rows, first, end, kv_head, T.bind(unit % i32(rows.head_tiles) * i32(rows.heads)))
        wait_previous()
        with when(any_left(operands.done, first, end, rows.tokens, T.bind(thread % i32(32)))):
            block = begin(shape, thread)
            load_queries(block, place, operands)
            cursor = registers(1, "int32")
            store(cursor, 0, first)
            with T.While(load(cursor, 0) < end):
                segment = segment_at(spec, operands, T.bind(load(cursor, 0)), end, block.lane)
                _segment(block, place, operands, segment, thread)
                store(cursor, 0, segment.end_token)
            launch_next()
            write(block, place, operands)


def load_queries(block: Block, place: Place, operands: Operands) -> None:
    """The warp's half of its 16 queries' dimensions, as left operands."""
    spec = block.shape.spec
    for upper in range(2):
        row = T.bind(block.row_tile * i32(16) + block.lane // i32(4) + i32(8 * upper))
        token = place.token(row)
        with when(place.exists(row, token)):
            source = T.cast(token, "int64") * i64(spec.query_heads) + T.cast(place.head(row), "int64")
            for step in range(block.shape.steps):
                for part in range(2):
                    column = T.bind(
                        (block.share * i32(block.shape.steps) + i32(step)) * i32(16)
                        + block.lane % i32(4) * i32(2)
                        + i32(8 * part)
                    )
                    with when(column < i32(spec.key_dim)):
                        start = T.bind(source * i64(spec.key_dim) + T.cast(column, "int64"))
                        scale = T.float32(query_scale(spec))
                        low, high = (
                            clamped(spec.dtype, T.bind(x * scale)) for x in floats_2(operands.q, start)
                        )
                        store(block.queries, 4 * step + 2 * part + upper, pack(spec.dtype, low, high))


def _segment(block: Block, place: Place, operands: Operands, segment: Segment, thread: Expr) -> None:
    spec, threads = block.shape.spec, block.shape.threads
    source = Source(operands.k_cache, spec.kv_heads, spec.key_dim, operands.table)
    bounds = Bounds(registers(1, "int32"), registers(1, "int32"))
    find_bounds(place, segment, bounds, [block.row])
    first, last = T.bind(load(bounds.first, 0)), T.bind(load(bounds.last, 0))
    page = registers(1, "int32")
    lowest, highest = T.bind(segment.first // i32(WIDTH)), T.bind(segment.last // i32(WIDTH))
    source.read_pages(page, segment, lowest, WIDTH)
    source.copy(block.keys(i32(0)), page, place.kv_head, segment, lowest, thread, threads)
    call("copy_commit")
    source.read_pages(page, segment, lowest + i32(1), WIDTH)
    with T.serial(i32(0), highest - lowest + i32(1)) as step:
        tile = T.bind(lowest + step)
        call("copy_wait", i32(0))
        sync()
        with when(tile < highest):
            following = block.keys(T.bind((step + i32(1)) % i32(2)))
            source.copy(following, page, place.kv_head, segment, T.bind(tile + i32(1)), thread, threads)
        call("copy_commit")
        source.read_pages(page, segment, tile + i32(2), WIDTH)
        attend(block, block.keys(T.bind(step % i32(2))), T.bind(tile * i32(WIDTH)), first, last)
    sync()


def write(block: Block, place: Place, operands: Operands) -> None:
    """Divide by the rows' totals, and write."""
    spec, shape = block.shape.spec, block.shape
    total = warp_sum(load(block.total, 0), 4)
    with when(block.lane % i32(4) == i32(0)):
        token = place.token(block.row)
        with when(place.exists(block.row, token)):
            inverse = inverse_total(operands, load(block.highest, 0), total, place.head(block.row))
            store(block.words, i32(block.row_numbers) + block.row, inverse)
    sync()
    for tile in range(shape.row_tiles):
        for upper in range(2):
            row = T.bind(i32(16 * tile + 8 * upper) + block.lane // i32(4))
            token = place.token(row)
            with when(place.exists(row, token)):
                scale = T.bind(row_number(block, tile, upper))
                target = T.cast(token, "int64") * i64(spec.query_heads) + T.cast(place.head(row), "int64")
                for fragment in range(shape.fragments):
                    column = T.bind(
                        block.warp * i32(shape.columns) + i32(8 * fragment) + block.lane % i32(4) * i32(2)
                    )
                    with when(column < i32(spec.value_dim)):
                        start = T.bind(target * i64(spec.value_dim) + T.cast(column, "int64"))
                        number = 4 * (tile * shape.fragments + fragment) + 2 * upper
                        pair = (load(block.values, number + odd) * scale for odd in range(2))
                        store_results(operands, start, *pair)
