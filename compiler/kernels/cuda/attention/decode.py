"""Steps of few tokens: blocks share a token's context, and the last of them to arrive puts the results together.

A step's own tokens are read from ``k`` and ``v``, where no block has to wait for another one's append; one block of
each token and key head appends. What is in the cache before the step is read before the previous kernel is done.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.emit import Expr, i64, store, when
from moec.compiler.kernels.cuda.attention.append import append_token
from moec.compiler.kernels.cuda.attention.decode_merge import Output, finish, shared_bytes
from moec.compiler.kernels.cuda.attention.decode_plan import BLOCK_TILES, THREADS, TILE, WARPS, Plan
from moec.compiler.kernels.cuda.attention.decode_softmax import (
    Running,
    add_values,
    begin,
    put_queries,
    score,
    weigh,
)
from moec.compiler.kernels.cuda.attention.decode_tile import (
    Held,
    key_numbers,
    load_keys,
    load_values,
    read_page,
    seen,
)
from moec.compiler.kernels.cuda.attention.operands import Operands, settled
from moec.compiler.kernels.cuda.attention.where import Where, locate
from moec.compiler.kernels.cuda.primitives import (
    i32,
    launch,
    launch_next,
    registers,
    shared_dynamic,
    sync,
    wait_previous,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


def decode(plan: Plan, operands: Operands) -> None:
    """Launch the kernel, which also appends."""
    with launch((plan.splits, plan.units, operands.tokens), THREADS) as ((part, unit, token), thread):
        warp, lane = T.bind(thread // i32(32)), T.bind(thread % i32(32))
        where = locate(plan.spec, operands, token, T.bind(unit // i32(plan.tiles)), lane, TILE)
        tiles = T.bind(where.cached + i32(1))
        active = settled(
            T.min((tiles + i32(BLOCK_TILES - 1)) // i32(BLOCK_TILES), i32(plan.splits))
        )
        memory = shared_dynamic(shared_bytes(plan) // 4, "float32")
        with when(part < active):
            row = T.bind(
                T.cast(token, "int64") * i64(plan.spec.query_heads)
                + T.cast(where.head * i32(plan.group) + unit % i32(plan.tiles) * i32(plan.rows), "int64")
            )
            count = settled(T.min(i32(plan.group) - unit % i32(plan.tiles) * i32(plan.rows), i32(plan.rows)))
            mine = settled(tirx.truncdiv(part * tiles, active) + warp)
            end = settled(tirx.truncdiv((part + i32(1)) * tiles, active))
            running = begin(plan)
            held = _registers(plan)
            lane_part = (T.bind(lane // i32(4)), T.bind(lane % i32(4)))
            with when(T.And(mine < end, mine < where.cached)):
                read_page(operands, where, held, mine)
                load_keys(plan, operands, where, held, mine, lane_part)
                load_values(plan, operands, where, held, mine, lane_part)
            wait_previous()
            with when(T.And(part == i32(0), unit % i32(plan.tiles) == i32(0))):
                append_token(plan.spec, operands, where.token, where.head, thread, THREADS)
            put_queries(plan, operands, memory, row, count, warp, lane)
            sync()
            with when(T.And(mine < end, mine == where.cached)):
                load_keys(plan, operands, where, held, mine, lane_part)
                load_values(plan, operands, where, held, mine, lane_part)
            with _tiles_of_warp(mine, end) as tile:
                _tile(plan, operands, where, held, running, memory, (tile, end), lane_part, lane)
            launch_next()
            sync()
            output = Output(token, unit, part, active, row, count)
            finish(plan, operands, memory, running, output, thread)


def _registers(plan: Plan) -> Held:
    held = Held(
        registers(8 * plan.key_steps, "uint32"),
        registers(16 * plan.value_steps, "uint32"),
        registers(1, "int32"),
    )
    for buffer, size in ((held.keys, 8 * plan.key_steps), (held.values, 16 * plan.value_steps)):
        for place in range(size):
            store(buffer, place, T.uint32(0))
    return held


@contextmanager
def _tiles_of_warp(begin: Expr, end: Expr) -> Iterator[Expr]:
    with T.serial(i32(0), (end - begin + i32(WARPS - 1)) // i32(WARPS)) as step:
        yield T.bind(begin + step * i32(WARPS))


def _tile(
    plan: Plan,
    operands: Operands,
    where: Where,
    held: Held,
    running: Running,
    queries: tirx.Buffer,
    tiles: tuple[Expr, Expr],
    lane_part: tuple[Expr, Expr],
    lane: Expr,
) -> None:
    """Attend to one tile, while the next is loaded."""
    tile, end = tiles
    following = T.bind(tile + i32(WARPS))
    scores = registers(4 * plan.halves)
    score(plan, queries, held, scores, lane)
    with when(following < end):
        with when(following < where.cached):
            read_page(operands, where, held, following)
        load_keys(plan, operands, where, held, following, lane_part)
    weigh(plan, running, scores, seen(plan, where, tile), key_numbers(lane_part[1]))
    add_values(plan, running, scores, held)
    with when(following < end):
        load_values(plan, operands, where, held, following, lane_part)
