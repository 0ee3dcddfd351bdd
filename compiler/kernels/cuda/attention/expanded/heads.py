"""Flash attention of chosen runs over one round of expanded keys; what it knows goes on to the next round.

As in `attention.prefill`, but keys lie in rows one after the other: those of a head, and the part that all heads share.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.expanded.plan import (
    LEAST_TOKENS,
    RUN_TILE,
    WIDTH,
    Run,
    counted,
    find,
)
from moec.compiler.kernels.cuda.attention.expanded.room import ROWS
from moec.compiler.kernels.cuda.attention.operands import Operands, first_seen
from moec.compiler.kernels.cuda.attention.prefill.softmax import (
    Sums,
    add_values,
    begin,
    own_places,
    score,
    weigh,
    write,
)
from moec.compiler.kernels.cuda.attention.rows import Bounds, Place, Rows
from moec.compiler.kernels.cuda.attention.tiles import PIECE, Tile, put_queries
from moec.compiler.kernels.cuda.primitives import (
    call,
    element,
    i32,
    launch,
    launch_next,
    registers,
    shared_dynamic,
    sync,
    wait_previous,
    warp_sum,
)
from moec.compiler.kernels.emit import Expr, either, i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cuda.attention.expanded.room import Expanded

NARROW = 128
"""Largest dimension of values for which a warp has 32 rows."""


def query_tiles(operands: Operands) -> Expr:
    """Tiles of query rows that all runs together can have."""
    return tirx.truncdiv(operands.tokens + i64(ROWS - 1), i64(ROWS)) + tirx.truncdiv(
        operands.tokens, i64(LEAST_TOKENS)
    )


@contextmanager
def tile_at(
    spec: AttentionSpec, expanded: Expanded, head: Expr, late: Expr, thread: Expr
) -> Iterator[tuple[Run, Place]]:
    """What a block has to do, if anything: its run, and which query rows; the longest contexts come first."""
    tile = T.bind(counted(expanded, 1) - i32(1) - late)
    with when(tile >= i32(0)):
        run = find(expanded, T.bind(thread % i32(32)), tile, RUN_TILE)
        first = T.bind(run.first + (tile - run.tile) * i32(ROWS))
        end = T.bind(T.min(first + i32(ROWS), run.end))
        yield run, Place(Rows(spec, ROWS), first, end, head, i32(0))


def span_of(
    spec: AttentionSpec, expanded: Expanded, run: Run, place: Place, number: Expr, width: int
) -> tuple[tuple[Expr, Expr], Expr, Expr]:
    """First and last tile of a run's keys, each of ``width``, that are in this round; and that are seen at all."""
    capacity = T.bind(i32(expanded.capacity))
    start = T.bind(run.position + place.first_token - run.first)
    last = T.bind(run.position + place.end_token - i32(1) - run.first)
    lowest = T.bind((first_seen(spec, start) - run.lowest) // i32(width))
    highest = T.bind((last - run.lowest) // i32(width))
    before = T.bind(i32(number) * capacity - run.row)
    low = T.bind(T.max(lowest, before // i32(width)))
    high = T.bind(T.min(highest, (before + capacity) // i32(width) - i32(1)))
    return (low, high), lowest, highest


def bounds_of(spec: AttentionSpec, run: Run, place: Place, sums: Sums) -> Bounds:
    """What each of the lane's rows sees."""
    bounds = Bounds(registers(2 * sums.tiles, "int32"), registers(2 * sums.tiles, "int32"))
    for which, row in enumerate(sums.rows):
        token = place.token(row)
        position = T.bind(run.position + token - run.first)
        store(bounds.first, which, first_seen(spec, position))
        store(bounds.last, which, T.Select(token < place.end_token, position, i32(-1)))
    return bounds


@dataclass(frozen=True)
class _Block:
    """What the parts of the kernel share."""

    spec: AttentionSpec
    """Of the expanded heads."""
    expanded: Expanded
    head: Expr
    run: Run
    queries: Tile
    keys: Tile
    values: Tile
    thread: Expr
    threads: int


def emit_heads(operands: Operands, expanded: Expanded, number: Expr) -> None:
    """Launch round ``number``."""
    spec = expanded.room.spec.expanded
    warps = 4 if spec.value_dim <= NARROW else 8
    threads = 32 * warps
    with launch((spec.query_heads, query_tiles(operands)), threads) as ((head, late), thread):
        queries = Tile(None, 0, ROWS, spec.key_dim)
        keys = Tile(None, queries.end, WIDTH, spec.key_dim)
        values = Tile(None, keys.end, WIDTH, spec.value_dim)
        memory = shared_dynamic(values.end)
        queries, keys, values = (replace(tile, memory=memory) for tile in (queries, keys, values))
        wait_previous()
        with tile_at(spec, expanded, head, late, thread) as (run, place):
            block = _Block(spec, expanded, head, run, queries, keys, values, thread, threads)
            _tile(block, operands, place, number)
        launch_next()


def _tile(block: _Block, operands: Operands, place: Place, number: Expr) -> None:
    """A tile of query rows: which of the keys that it sees are in this round."""
    spec, run, expanded = block.spec, block.run, block.expanded
    span, lowest, highest = span_of(spec, expanded, run, place, number, WIDTH)
    low, high = span
    with when(low <= high):
        put_queries(place, operands, block.queries, block.thread, block.threads)
        sums = begin(spec, ROWS // (16 * (block.threads // 32)), block.thread)
        with when(low > lowest):
            resume(spec, expanded, operands, place, sums)
        _keys(block, place, sums, span, T.bind(i32(number) * i32(expanded.capacity) - run.row))
        either(
            high == highest,
            lambda: write(place, operands, sums),
            lambda: suspend(spec, expanded, operands, place, sums),
        )


def _keys(block: _Block, place: Place, sums: Sums, tiles: tuple[Expr, Expr], before: Expr) -> None:
    """Attend to tiles of keys, counted from the run's first."""
    spec, run = block.spec, block.run
    low, high = tiles
    bounds = bounds_of(spec, run, place, sums)
    start = T.bind(run.position + place.first_token - run.first)
    latest = T.bind(run.position + place.end_token - i32(1) - run.first)
    last_first = first_seen(spec, latest)
    _copy_keys(block, T.bind(low * i32(WIDTH) - before))
    call("copy_wait", i32(0))
    sync()
    with T.serial(i32(0), high - low + i32(1)) as step:
        tile = T.bind(low + step)
        row = T.bind(tile * i32(WIDTH) - before)
        _copy_values(block, row)
        scores = score(spec, sums, block.queries, block.keys)
        call("copy_wait", i32(0))
        sync()
        with when(tile < high):
            _copy_keys(block, T.bind(row + i32(WIDTH)))
        position = T.bind(run.lowest + tile * i32(WIDTH))
        inside = T.And(position >= last_first, position + i32(WIDTH) <= start + i32(1))
        weigh(spec, sums, scores, bounds, position, T.bind(inside))
        add_values(spec, sums, scores, block.values)
        call("copy_wait", i32(0))
        sync()


def _copy_keys(block: _Block, row: Expr) -> None:
    """Start to copy a tile of keys from a row of the round: the head's own part, then the shared one."""
    room, expanded = block.expanded.room, block.expanded
    own, rope = room.heads.nope_dim, room.rope_dim
    head = T.bind((i64(block.head) * expanded.capacity + i64(row)) * i64(own))
    for step, at, piece in _pieces(block, block.keys, (own + rope) // PIECE):
        target = element(block.keys.memory, T.bind(block.keys.at(at, piece)))
        of_head = T.bind(piece < i32(own // PIECE))

        def head_part(target: Expr = target, at: Expr = at, piece: Expr = piece) -> None:
            place = T.bind(head + i64(at * i32(own) + piece * i32(PIECE)))
            call("copy_async_16", target, element(expanded.keys, place))

        def shared_part(target: Expr = target, at: Expr = at, piece: Expr = piece) -> None:
            column = piece * i32(PIECE) - i32(own)
            place = T.bind((i64(row) + i64(at)) * i64(rope) + i64(column))
            call("copy_async_16", target, element(expanded.shared, place))

        with when(step):
            either(of_head, head_part, shared_part)
    _fill_up(block, block.keys, (own + rope) // PIECE)
    call("copy_commit")


def _copy_values(block: _Block, row: Expr) -> None:
    """Start to copy a tile of values."""
    expanded, size = block.expanded, block.spec.value_dim
    head = T.bind((i64(block.head) * expanded.capacity + i64(row)) * i64(size))
    for step, at, piece in _pieces(block, block.values, size // PIECE):
        target = element(block.values.memory, T.bind(block.values.at(at, piece)))
        with when(step):
            place = T.bind(head + i64(at * i32(size) + piece * i32(PIECE)))
            call("copy_async_16", target, element(expanded.values, place))
    _fill_up(block, block.values, size // PIECE)
    call("copy_commit")


def _pieces(block: _Block, tile: Tile, pieces: int) -> list[tuple[Expr, Expr, Expr]]:
    """A thread's pieces of a tile: whether there is such a one, its row, its number in the row."""
    found = []
    for start in range(0, tile.rows * pieces, block.threads):
        number = T.bind(block.thread + i32(start))
        found.append((number < i32(tile.rows * pieces), number // i32(pieces), number % i32(pieces)))
    return found


def _fill_up(block: _Block, tile: Tile, pieces: int) -> None:
    """Zero the piece that a row has for alignment only."""
    if tile.pieces == pieces:
        return
    zero = T.uint32(0)
    with when(block.thread < i32(tile.rows)):
        place = T.bind(tile.at(block.thread, tile.pieces - 1))
        call("store_16", element(tile.memory, place), zero, zero, zero, zero)


def _state(spec: AttentionSpec, place: Place, token: Expr) -> Expr:
    """Where a row's maximum is."""
    return T.bind((i64(token) * i64(spec.query_heads) + i64(place.kv_head)) * i64(2))


def suspend(spec: AttentionSpec, expanded: Expanded, operands: Operands, place: Place, sums: Sums) -> None:
    """Leave a row's sums in the output, and its maximum and total beside."""
    for which, row in enumerate(sums.rows):
        token = place.token(row)
        total = warp_sum(load(sums.total, which), 4)
        with when(place.exists(row, token)):
            at = _state(spec, place, token)
            store(expanded.state, at, load(sums.highest, which))
            store(expanded.state, at + i64(1), total)
            for target, source in _outputs(spec, place, sums, token, which):
                store(operands.out, target, load(sums.values, source))


def resume(spec: AttentionSpec, expanded: Expanded, operands: Operands, place: Place, sums: Sums) -> None:
    """Go on where an earlier round stopped: the first of four lanes has the total of all."""
    for which, row in enumerate(sums.rows):
        token = place.token(row)
        with when(place.exists(row, token)):
            at = _state(spec, place, token)
            store(sums.highest, which, load(expanded.state, at))
            total = T.bind(load(expanded.state, at + i64(1)))
            first = sums.lane % i32(4) == i32(0)
            store(sums.total, which, T.Select(first, total, T.float32(0)))
            for target, source in _outputs(spec, place, sums, token, which):
                store(sums.values, source, load(operands.out, target))


def _outputs(
    spec: AttentionSpec, place: Place, sums: Sums, token: Expr, which: int
) -> list[tuple[Expr, int]]:
    """Where the sums of a lane's row are in the output, and in registers."""
    row = i64(token) * i64(spec.query_heads) + i64(place.kv_head)
    start = T.bind(row * i64(spec.value_dim) + i64(sums.lane % i32(4) * i32(2)))
    places = own_places(which, sums.fragments)[: spec.value_dim // 4]
    return [(start + i64(n // 2 * 8 + n % 2), source) for n, source in enumerate(places)]
