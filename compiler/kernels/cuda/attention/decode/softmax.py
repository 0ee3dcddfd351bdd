"""A warp's products with 16 keys and values, and the softmax between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.convert import clamped, floats, split
from moec.compiler.kernels.cuda.attention.decode.plan import WARPS, Plan
from moec.compiler.kernels.cuda.attention.operands import HIDDEN, LOWEST, exponent, query_scale
from moec.compiler.kernels.cuda.primitives import (
    call,
    element,
    i32,
    mma,
    registers,
    value,
    warp_max,
)
from moec.compiler.kernels.emit import Buffer, Expr, load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.attention.decode.tile import Held
    from moec.compiler.kernels.cuda.attention.operands import Operands


@dataclass(frozen=True)
class Running:
    """A lane's part of the softmax: of row g, and of row 8 + g where there are 16."""

    highest: Buffer
    total: Buffer
    """Of the lane's own keys."""
    sums: Buffer
    """Of values: fragments of 8 columns; column n of fragment j is dimension 8n + j of every 64."""


def begin(plan: Plan) -> Running:
    """Nothing seen yet."""
    running = Running(registers(plan.halves), registers(plan.halves), registers(32 * plan.value_steps))
    for half in range(plan.halves):
        store(running.highest, half, T.float32(LOWEST))
        store(running.total, half, T.float32(0))
    for place in range(32 * plan.value_steps):
        store(running.sums, place, T.float32(0))
    return running


def put_queries(
    plan: Plan, operands: Operands, shared: Buffer, row: Expr, count: Expr, warp: Expr, lane: Expr
) -> None:
    """Write the block's queries into shared memory as operands, lane by lane.

    Args:
        plan: the division.
        operands: the tensors.
        shared: for each 32 dimensions ``2 * halves`` fragments of 4 words for each lane.
        row: row of q (int64) of the block's first query head.
        count: the block's query heads.
        warp: number of the warp.
        lane: number of the lane.
    """
    group, part = T.bind(lane // i32(4)), T.bind(lane % i32(4))
    for start in range(0, plan.key_steps, WARPS):
        step = T.bind(warp + i32(start))
        with when(step < i32(plan.key_steps)):
            words = registers(8 * plan.halves, "uint32")
            piece = T.bind(step * i32(4) + part)
            for half in range(plan.halves):
                for word in range(8):
                    store(words, 8 * half + word, T.uint32(0))
                head = T.bind(group + i32(8 * half))
                with when(T.And(head < count, piece < i32(plan.spec.key_dim // 8))):
                    _split_query(plan, operands, words, 8 * half, row, head, piece)
            for number, fragment in enumerate(_fragments(plan)):
                place = T.bind(((step * i32(2 * plan.halves) + i32(number)) * i32(32) + lane) * i32(4))
                call("store_16", element(shared, place), *(T.bind(load(words, word)) for word in fragment))


def _split_query(
    plan: Plan, operands: Operands, words: Buffer, start: int, row: Expr, head: Expr, piece: Expr
) -> None:
    """Eight numbers of a query as four pairs, then four pairs of what rounding left out."""
    place = T.bind(
        (row + T.cast(head, "int64")) * T.int64(plan.spec.key_dim) + T.cast(piece * i32(8), "int64")
    )
    dtype = plan.spec.dtype
    scaled = [
        clamped(dtype, T.bind(x * T.float32(query_scale(plan.spec)))) for x in floats(operands.q, place, 8)
    ]
    for pair in range(4):
        high, low = split(dtype, scaled[2 * pair], scaled[2 * pair + 1])
        store(words, start + pair, high)
        store(words, start + 4 + pair, low)


def _fragments(plan: Plan) -> list[tuple[int, int, int, int]]:
    """Which of a lane's words are the operands of a step's products, in order."""
    if plan.rows == 8:
        return [(0, 4, 1, 5), (2, 6, 3, 7)]
    return [(0, 8, 1, 9), (2, 10, 3, 11), (4, 12, 5, 13), (6, 14, 7, 15)]


def score(plan: Plan, queries: Buffer, held: Held, scores: Buffer, lane: Expr) -> None:
    """Products of the block's queries with a tile's keys: ``scores [halves][4]`` for the lane's four keys."""
    sums = registers(8)
    for place in range(8):
        store(sums, place, T.float32(0))
    for step in range(plan.key_steps):
        for number in range(2 * plan.halves):
            a = registers(4, "uint32")
            place = T.bind((lane + i32((step * 2 * plan.halves + number) * 32)) * i32(4))
            call("load_16", element(a, 0), element(queries, place))
            fragment = [load(a, word) for word in range(4)]
            for tile in range(2):
                first = 4 * (tile * plan.key_steps + step) + 2 * (number % 2)
                b = [load(held.keys, first), load(held.keys, first + 1)]
                mma(plan.spec.dtype, element(sums, 4 * tile), fragment, b)
    for tile in range(2):
        for key in range(2):
            low, high = load(sums, 4 * tile + key), load(sums, 4 * tile + key + 2)
            found = [low + high] if plan.halves == 1 else [low, high]
            for half, product in enumerate(found):
                store(scores, 4 * half + 2 * tile + key, exponent(plan.spec, T.bind(product)))


def weigh(plan: Plan, running: Running, scores: Buffer, visible: Expr, keys: list[Expr]) -> None:
    """Scores to weights, and the running maximum, total and sums along with them."""
    for half in range(plan.halves):
        largest = T.bind(load(running.highest, half))
        for number, key in enumerate(keys):
            bit = (visible >> T.cast(key, "uint32")) & T.uint32(1)
            shown = T.bind(T.Select(bit != T.uint32(0), load(scores, 4 * half + number), T.float32(HIDDEN)))
            store(scores, 4 * half + number, shown)
            largest = T.bind(T.max(largest, shown))
        largest = warp_max(largest, 4)
        scale = value("float32", "exp2", load(running.highest, half) - largest)
        store(running.highest, half, largest)
        total = T.bind(load(running.total, half) * scale)
        for number in range(4):
            weight = value("float32", "exp2", load(scores, 4 * half + number) - largest)
            store(scores, 4 * half + number, weight)
            total = T.bind(total + weight)
        store(running.total, half, total)
        for fragment in range(8 * plan.value_steps):
            for place in (0, 1, 2, 3) if plan.halves == 1 else (2 * half, 2 * half + 1):
                number = 4 * fragment + place
                store(running.sums, number, load(running.sums, number) * scale)


def weights(plan: Plan, scores: Buffer) -> list[list[Expr]]:
    """Weights as left operands: one, whose upper half is what rounding left out, or two."""
    dtype = plan.spec.dtype
    parts = [
        [
            split(dtype, load(scores, 4 * half + 2 * pair), load(scores, 4 * half + 2 * pair + 1))
            for pair in range(2)
        ]
        for half in range(plan.halves)
    ]
    if plan.halves == 1:
        return [[parts[0][0][0], parts[0][0][1], parts[0][1][0], parts[0][1][1]]]
    return [
        [parts[0][0][which], parts[1][0][which], parts[0][1][which], parts[1][1][which]] for which in range(2)
    ]


def add_values(plan: Plan, running: Running, weighed: list[list[Expr]], held: Held, first: int = 0) -> None:
    """Add a tile's values that are held, from 64 times ``first``, weighed."""
    for step in range(min(plan.value_steps_at_once, plan.value_steps - first)):
        for word in range(4):
            words = [load(held.values, 4 * (4 * step + number) + word) for number in range(4)]
            for odd, name in enumerate(("low_halves", "high_halves")):
                b = [value("uint32", name, words[0], words[1]), value("uint32", name, words[2], words[3])]
                place = 4 * (8 * (first + step) + 2 * word + odd)
                for a in weighed:
                    mma(plan.spec.dtype, element(running.sums, place), a, b)
