"""The results of the blocks that shared a token's latents, put together: always in the same order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.convert import floats
from moec.compiler.kernels.cuda.attention.latent_block import WIDTH
from moec.compiler.kernels.cuda.attention.latent_decode import MOST_PARTS, LatentPlan, results
from moec.compiler.kernels.cuda.attention.operands import LOWEST, Operands, settled
from moec.compiler.kernels.cuda.attention.prefill_softmax import inverse_total
from moec.compiler.kernels.cuda.attention.where import locate
from moec.compiler.kernels.cuda.primitives import (
    i32,
    launch,
    launch_next,
    registers,
    shared,
    sync,
    value,
    wait_previous,
    warp_max,
    warp_sum,
)
from moec.compiler.kernels.emit import Buffer, Expr, i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.model import AttentionSpec

WARPS = 4
COLUMNS = 128
"""Of a block: four for each lane; the warps share the parts."""


def latent_combine(
    spec: AttentionSpec, operands: Operands, active_of: Callable[[Expr], Expr] | None = None
) -> None:
    """Launch the kernel.

    Args:
        spec: which attention.
        operands: its operands.
        active_of: how many blocks shared a token's latents, where that was found on the device.
    """
    plan = LatentPlan(spec)
    columns = -(-spec.value_dim // COLUMNS)
    with launch((columns, spec.query_heads, operands.tokens), 32 * WARPS) as ((piece, head, token), thread):
        warp, lane = T.bind(thread // i32(32)), T.bind(thread % i32(32))
        parts = settled(plan.parts(operands.tokens))
        memory = results(plan, operands)
        launch_next()
        if active_of is None:
            active = plan.active(locate(spec, operands, token, i32(0), lane, WIDTH), parts)
            wait_previous()
        else:
            wait_previous()
            active = active_of(token)
        with when(active > i32(1)):
            row = T.bind(T.cast(token * parts * i32(spec.query_heads) + head, "int64"))
            highest, total = _totals(plan, memory, row, active, lane)
            column = T.bind(piece * i32(COLUMNS) + lane * i32(4))
            sums = _sums(plan, memory, row, active, warp, column, highest)
            held = shared(WARPS * COLUMNS)
            for number in range(4):
                store(held, T.bind(thread * i32(4) + i32(number)), load(sums, number))
            sync()
            with when(T.And(warp == i32(0), column < i32(spec.value_dim))):
                scale = inverse_total(operands, highest, total, head)
                target = T.cast(token * i32(spec.query_heads) + head, "int64") * i64(spec.value_dim)
                start = T.bind(target + T.cast(column, "int64"))
                for number in range(4):
                    place = lane * i32(4) + i32(number)
                    found = [load(held, place + i32(COLUMNS * other)) for other in range(WARPS)]
                    store(operands.out, start + i64(number), sum(found[1:], found[0]) * scale)


def _fact(plan: LatentPlan, row: Expr, part: Expr) -> Expr:
    """Where a part's maximum for a row is; its total is behind it."""
    slot = row + T.cast(part, "int64") * i64(plan.spec.query_heads)
    return T.bind(i64(plan.facts) + slot * i64(2))


def _totals(plan: LatentPlan, memory: Buffer, row: Expr, active: Expr, lane: Expr) -> tuple[Expr, Expr]:
    """The maximum over all parts, and the total."""
    count = MOST_PARTS // 32
    highest, totals = registers(count), registers(count)
    for number in range(count):
        store(highest, number, T.float32(LOWEST))
        store(totals, number, T.float32(0))
        part = T.bind(lane + i32(32 * number))
        with when(part < active):
            fact = _fact(plan, row, part)
            store(highest, number, load(memory, fact))
            store(totals, number, load(memory, fact + i64(1)))
    largest = T.bind(load(highest, 0))
    for number in range(1, count):
        largest = T.bind(T.max(largest, load(highest, number)))
    largest = warp_max(largest)
    total: Expr = T.float32(0)
    for number in range(count):
        weight = value("float32", "exp2", load(highest, number) - largest)
        total = T.bind(total + weight * load(totals, number))
    return largest, warp_sum(total)


def _sums(
    plan: LatentPlan, memory: Buffer, row: Expr, active: Expr, warp: Expr, column: Expr, highest: Expr
) -> Buffer:
    """Sums of four columns over the warp's parts."""
    spec = plan.spec
    sums = registers(4)
    for number in range(4):
        store(sums, number, T.float32(0))
    inside = T.bind(T.min(column, i32(spec.value_dim - 4)))
    with T.serial(i32(0), (active - warp + i32(WARPS - 1)) // i32(WARPS)) as step:
        part = T.bind(warp + step * i32(WARPS))
        weight = value("float32", "exp2", load(memory, _fact(plan, row, part)) - highest)
        slot = row + T.cast(part, "int64") * i64(spec.query_heads)
        four = floats(memory, T.bind(slot * i64(spec.value_dim) + T.cast(inside, "int64")), 4)
        for number in range(4):
            store(sums, number, load(sums, number) + weight * four[number])
    return sums
