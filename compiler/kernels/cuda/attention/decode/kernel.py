"""Steps of few tokens: blocks share a token's context, and the last of them to arrive puts the results together.

A step's own tokens are read from ``k`` and ``v``, where no block has to wait for another one's append; one block of
each token and key head appends. What is in the cache before the step is read before the previous kernel is done.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.append import append_token
from moec.compiler.kernels.cuda.attention.bias import bias_of, bias_row
from moec.compiler.kernels.cuda.attention.decode.merge import Output, finish, shared_bytes
from moec.compiler.kernels.cuda.attention.decode.plan import BLOCK_TILES, THREADS, TILE, WARPS, Plan
from moec.compiler.kernels.cuda.attention.decode.softmax import (
    Running,
    add_values,
    begin,
    put_queries,
    score,
    weigh,
    weights,
)
from moec.compiler.kernels.cuda.attention.decode.tile import Loader, hold, key_numbers, seen
from moec.compiler.kernels.cuda.attention.operands import Operands, settled
from moec.compiler.kernels.cuda.attention.where import locate
from moec.compiler.kernels.cuda.primitives import (
    i32,
    launch,
    launch_next,
    registers,
    shared_dynamic,
    sync,
    wait_previous,
)
from moec.compiler.kernels.emit import Buffer, Expr, i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Iterator


def decode(plan: Plan, operands: Operands) -> None:
    """Launch the kernel, which also appends."""
    with launch((plan.splits, plan.units, operands.tokens), THREADS) as ((part, unit, token), thread):
        lane = T.bind(thread % i32(32))
        where = locate(plan.spec, operands, token, T.bind(unit // i32(plan.tiles)), lane, TILE)
        tiles = where.tiles
        active = settled(T.min((tiles + i32(BLOCK_TILES - 1)) // i32(BLOCK_TILES), i32(plan.splits)))
        memory = shared_dynamic(shared_bytes(plan) // 4, "float32")
        with when(part < active):
            first_row = T.bind(unit % i32(plan.tiles) * i32(plan.rows))
            head = T.cast(where.head * i32(plan.group) + first_row, "int64")
            row = T.bind(T.cast(token, "int64") * i64(plan.spec.query_heads) + head)
            count = settled(T.min(i32(plan.group) - first_row, i32(plan.rows)))
            output = Output(token, unit, part, active, row, count)
            loader = Loader(plan, operands, where, hold(plan), T.bind(lane // i32(4)), T.bind(lane % i32(4)))
            running = _attend(loader, memory, output, thread)
            launch_next()
            sync()
            finish(plan, operands, memory, running, output, thread)


def _attend(loader: Loader, memory: Buffer, output: Output, thread: Expr) -> Running:
    """The warp's result for its share of the block's tiles."""
    plan, where = loader.plan, loader.where
    warp, lane = T.bind(thread // i32(32)), T.bind(thread % i32(32))
    tiles = where.tiles
    mine = settled(tirx.truncdiv(output.part * tiles, output.active) + warp)
    end = settled(tirx.truncdiv((output.part + i32(1)) * tiles, output.active))
    running = begin(plan)
    with when(T.And(mine < end, mine < where.cached)):
        loader.page(mine)
        _load(loader, mine)
    wait_previous()
    if not plan.spec.cross:
        with when(T.And(output.part == i32(0), output.unit % i32(plan.tiles) == i32(0))):
            append_token(plan.spec, loader.operands, where.token, where.head, thread, THREADS)
    put_queries(plan, loader.operands, memory, output.row, output.count, warp, lane)
    sync()
    if not plan.spec.cross:
        with when(T.And(mine < end, mine == where.cached)):
            _load(loader, mine)
    with _tiles_of_warp(mine, end) as tile:
        _tile(loader, running, memory, tile, end, lane, output)
    return running


@contextmanager
def _tiles_of_warp(begin: Expr, end: Expr) -> Iterator[Expr]:
    with T.serial(i32(0), (end - begin + i32(WARPS - 1)) // i32(WARPS)) as step:
        yield T.bind(begin + step * i32(WARPS))


def _load(loader: Loader, tile: Expr) -> None:
    """Load a tile as far as there are registers for it before its scores are known."""
    loader.keys(tile)
    if loader.plan.value_steps == loader.plan.value_steps_at_once:
        loader.values(tile)


def _tile(
    loader: Loader, running: Running, queries: Buffer, tile: Expr, end: Expr, lane: Expr, output: Output
) -> None:
    """Attend to one tile, while the next is loaded."""
    plan, where = loader.plan, loader.where
    following = T.bind(tile + i32(WARPS))
    scores = registers(4 * plan.halves)

    def next_keys() -> None:
        with when(following < where.cached):
            loader.page(following)
        loader.keys(following)

    score(plan, queries, loader.held, scores, lane)
    if loader.operands.bias is not None:
        _add_bias(loader, loader.operands.bias, scores, tile, output)
    if plan.value_steps == plan.value_steps_at_once:
        with when(following < end):
            next_keys()
        weigh(plan, running, scores, seen(where, tile), key_numbers(loader.part))
        add_values(plan, running, weights(plan, scores), loader.held)
        with when(following < end):
            loader.values(following)
        return
    loader.values(tile)
    weigh(plan, running, scores, seen(where, tile), key_numbers(loader.part))
    weighed = weights(plan, scores)
    for first in range(0, plan.value_steps, plan.value_steps_at_once):
        if first:
            loader.values(tile, first)
        add_values(plan, running, weighed, loader.held, first)
    with when(following < end):
        next_keys()


def _add_bias(loader: Loader, table: Buffer, scores: Buffer, tile: Expr, output: Output) -> None:
    """Add to the lane's scores of a tile what their distances have."""
    plan, where = loader.plan, loader.where
    first = T.Select(tile < where.cached, (where.tile + tile) * i32(TILE), where.base)
    before = T.bind(first - where.position)
    block_head = T.cast(output.row % i64(plan.spec.query_heads), "int32")
    for half in range(plan.halves):
        zero = bias_row(plan.spec, T.bind(block_head + loader.group + i32(8 * half)))
        for number, key in enumerate(key_numbers(loader.part)):
            place = 4 * half + number
            added = bias_of(plan.spec, table, zero, before + key)
            store(scores, place, load(scores, place) + added)
