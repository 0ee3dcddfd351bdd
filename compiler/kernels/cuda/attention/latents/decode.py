"""Steps of few tokens over latents: blocks share a token's context, and a second kernel puts their results together.

As in `attention.decode`, the step's own tokens are read from ``k``, and what is in the cache before the previous kernel
is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.append import append_token
from moec.compiler.kernels.cuda.attention.convert import clamped, floats, floats_2, split, stored
from moec.compiler.kernels.cuda.attention.latents.attend import attend
from moec.compiler.kernels.cuda.attention.latents.block import WIDTH, Block, begin, row_number
from moec.compiler.kernels.cuda.attention.latents.parts import LatentPlan, Part, results
from moec.compiler.kernels.cuda.attention.operands import Operands, query_scale, settled
from moec.compiler.kernels.cuda.attention.prefill.softmax import inverse_total
from moec.compiler.kernels.cuda.attention.rows import Segment
from moec.compiler.kernels.cuda.attention.tiles import PIECE, Source, Tile
from moec.compiler.kernels.cuda.attention.where import Where, locate
from moec.compiler.kernels.cuda.primitives import (
    call,
    element,
    i32,
    launch,
    launch_next,
    registers,
    sync,
    wait_previous,
    warp_sum,
)
from moec.compiler.kernels.emit import Buffer, Expr, either, i64, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec


def latent_decode(spec: AttentionSpec, operands: Operands) -> None:
    """Launch the kernel that attends; it also appends, in a block that has nothing else to do where there is one."""
    plan = LatentPlan(spec)
    shape = plan.shape
    parts = plan.parts(operands.tokens)
    units = spec.kv_heads * plan.head_tiles
    with launch((T.cast(parts, "int64"), units, operands.tokens), shape.threads) as (
        (number, unit, token),
        thread,
    ):
        parts = settled(parts)
        head_tile = T.bind(unit % i32(plan.head_tiles))
        lane = T.bind(thread % i32(32))
        where = locate(spec, operands, token, T.bind(unit // i32(plan.head_tiles)), lane, WIDTH)
        active = plan.active(where, parts)
        with when(number < active):
            head = settled(where.head * i32(plan.group) + head_tile * i32(plan.heads))
            count = settled(T.min(i32(plan.group) - head_tile * i32(plan.heads), i32(plan.heads)))
            part = Part(number, active, settled(token * parts + number), head, count)
            block = begin(shape, thread)
            _attend(block, operands, where, part, thread)
            launch_next()
            with when(T.And(active == parts, T.And(number == i32(0), head_tile == i32(0)))):
                append_token(spec, operands, where.token, where.head, thread, shape.threads)
            write(plan, block, operands, where.token, part)
        with when(T.And(number == active, head_tile == i32(0))):
            wait_previous()
            append_token(spec, operands, where.token, where.head, thread, shape.threads)


def _attend(block: Block, operands: Operands, where: Where, part: Part, thread: Expr) -> None:
    tiles = T.bind(where.cached + i32(1))
    first = settled(tirx.truncdiv(part.number * tiles, part.active))
    end = settled(tirx.truncdiv((part.number + i32(1)) * tiles, part.active))

    with when(first < where.cached):
        _copy(block, operands, where, i32(0), first, thread)
    with when(first == where.cached):
        _clear_beyond_own(block, block.keys(i32(0)), where, thread)
    call("copy_commit")
    wait_previous()
    load_queries(block, operands, where.token, part)
    with when(first == where.cached):
        _put_own(block, block.keys(i32(0)), operands, where, thread)

    def own(target: Expr) -> None:
        _clear_beyond_own(block, block.keys(target), where, thread)
        _put_own(block, block.keys(target), operands, where, thread)

    with T.serial(i32(0), end - first) as step:
        tile, following = T.bind(first + step), T.bind(first + step + i32(1))
        call("copy_wait", i32(0))
        sync()
        with when(following < end):
            target = T.bind((step + i32(1)) % i32(2))
            either(
                following < where.cached,
                lambda: _copy(block, operands, where, target, following, thread),
                lambda: own(target),
            )
        call("copy_commit")
        is_own = tile == where.cached
        start = T.bind(T.Select(is_own, where.base, (where.tile + tile) * i32(WIDTH)))
        last = T.bind(T.Select(is_own, where.position, where.base - i32(1)))
        attend(block, block.keys(T.bind(step % i32(2))), start, where.first, last)


def _copy(block: Block, operands: Operands, where: Where, target: Expr, tile: Expr, thread: Expr) -> None:
    """Start to copy a tile of the cache into one of the two tiles of keys."""
    spec = block.shape.spec
    source = Source(operands.k_cache, spec.kv_heads, spec.key_dim, operands.table)
    end = T.bind(where.token + i32(1))
    last = T.bind(where.base - i32(1))
    position = where.position
    cached = Segment(where.token, end, where.table, position, last, position, where.first, where.first)
    page = registers(1, "int32")
    number = T.bind(where.tile + tile)
    source.read_pages(page, cached, number, WIDTH)
    source.copy(block.keys(target), page, where.head, cached, number, thread, block.shape.threads)


def _own_rows(where: Where) -> Expr:
    """The sequence's tokens of this step up to this one, int32."""
    return T.bind(where.token - where.step_first + i32(1))


def _clear_beyond_own(block: Block, target: Tile, where: Where, thread: Expr) -> None:
    """Zeros in the tile of the step's own tokens behind the last of them."""
    threads, total = block.shape.threads, target.rows * target.pieces
    begin = T.bind(_own_rows(where) * i32(target.pieces) + thread)
    with T.serial(i32(0), (i32(total + threads - 1) - begin) // i32(threads)) as step:
        number = T.bind(begin + step * i32(threads))
        row, piece = T.bind(number // i32(target.pieces)), T.bind(number % i32(target.pieces))
        call("store_16", element(target.memory, T.bind(target.at(row, piece))), *[T.uint32(0)] * 4)


def _put_own(block: Block, target: Tile, operands: Operands, where: Where, thread: Expr) -> None:
    """The sequence's tokens of this step up to this one, rounded as the cache has them, as rows of a tile."""
    spec, threads = block.shape.spec, block.shape.threads
    total = T.bind(_own_rows(where) * i32(target.pieces))
    with T.serial(i32(0), (total + i32(threads - 1)) // i32(threads)) as step:
        number = T.bind(thread + step * i32(threads))
        row, piece = T.bind(number // i32(target.pieces)), T.bind(number % i32(target.pieces))
        words = registers(4, "uint32")
        for word in range(4):
            store(words, word, T.uint32(0))
        with when(T.And(number < total, piece < i32(spec.key_dim // PIECE))):
            token = T.cast(where.step_first + row, "int64")
            source = token * i64(spec.kv_heads) + T.cast(where.head, "int64")
            start = T.bind(source * i64(spec.key_dim) + T.cast(piece * i32(PIECE), "int64"))
            for word, pair in enumerate(stored(spec.dtype, floats(operands.k, start, PIECE))):
                store(words, word, pair)
        with when(number < total):
            place = element(target.memory, T.bind(target.at(row, piece)))
            call("store_16", place, *(T.bind(load(words, word)) for word in range(4)))


def load_queries(block: Block, operands: Operands, token: Expr, part: Part) -> None:
    """The warp's part of its 8 queries' dimensions, as left operands: rounded above, the rest below.

    All are read before the first is turned, from places that are there: what is no query's is left out afterwards.
    """
    spec, steps = block.shape.spec, block.shape.steps
    own = T.bind(block.row_tile * i32(8) + block.lane // i32(4))
    there = T.bind(own < part.count)
    head = T.bind(T.min(own, part.count - i32(1)))
    row = T.cast(token, "int64") * i64(spec.query_heads) + T.cast(part.first_head + head, "int64")
    source = T.bind(row * i64(spec.key_dim))
    first = T.bind(block.share * i32(16 * steps) + block.lane % i32(4) * i32(2))
    exact = block.shape.dimensions == spec.key_dim
    read = []
    for number in range(2 * steps):
        column = T.bind(first + i32(8 * number))
        inside = column if exact else T.bind(T.min(column, i32(spec.key_dim - 2)))
        pair = floats_2(operands.q, T.bind(source + T.cast(inside, "int64")))
        read.append((there if exact else T.bind(T.And(there, column < i32(spec.key_dim))), pair))
    for number, (valid, pair) in enumerate(read):
        scale = T.float32(query_scale(spec))
        low, high = (clamped(spec.dtype, T.bind(x * scale)) for x in pair)
        for upper, words in enumerate(split(spec.dtype, low, high)):
            store(block.queries, 2 * number + upper, T.Select(valid, words, T.uint32(0)))


def write(plan: LatentPlan, block: Block, operands: Operands, token: Expr, part: Part) -> None:
    """Write the results to the output, or to the workspace for the kernel that puts them together."""
    spec = plan.spec
    memory = results(plan, operands)
    total = warp_sum(load(block.total, 0), 4)
    highest = T.bind(load(block.highest, 0))
    head = T.bind(block.row_tile * i32(8) + block.lane // i32(4))
    slot = T.bind(T.cast(part.slot * i32(spec.query_heads) + part.first_head, "int64"))
    output = T.bind(T.cast(token * i32(spec.query_heads) + part.first_head, "int64"))
    sync()

    def alone() -> None:
        with when(T.And(T.And(block.lane % i32(4) == i32(0), block.share < i32(2)), head < part.count)):
            inverse = inverse_total(operands, highest, total, part.first_head + head)
            store(block.words, i32(block.row_numbers) + block.row, inverse)
        sync()
        _write_values(block, operands.out, output, part, scaled=True)

    def together() -> None:
        with when(T.And(T.And(block.lane % i32(4) == i32(0), block.share == i32(0)), head < part.count)):
            fact = T.bind(i64(plan.facts) + (slot + T.cast(head, "int64")) * i64(2))
            store(memory, fact, highest)
            store(memory, fact + i64(1), total)
        _write_values(block, memory, slot, part, scaled=False)

    either(part.active == i32(1), alone, together)


def _write_values(block: Block, target: Buffer, first_row: Expr, part: Part, *, scaled: bool) -> None:
    shape = block.shape
    for tile in range(shape.row_tiles):
        head = T.bind(i32(8 * tile) + block.lane // i32(4))
        with when(head < part.count):
            scale = T.bind(row_number(block, tile, 0)) if scaled else None
            row = T.bind((first_row + T.cast(head, "int64")) * i64(shape.spec.value_dim))
            for fragment in range(shape.fragments):
                column = T.bind(
                    block.warp * i32(shape.columns) + i32(8 * fragment) + block.lane % i32(4) * i32(2)
                )
                with when(column < i32(shape.spec.value_dim)):
                    start = T.bind(row + T.cast(column, "int64"))
                    for odd in range(2):
                        place = 4 * (tile * shape.fragments + fragment) + odd
                        number = load(block.values, place) + load(block.values, place + 2)
                        store(target, start + i64(odd), number if scale is None else number * scale)
