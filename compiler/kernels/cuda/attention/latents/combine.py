"""The results of the blocks that shared a token's latents, put together: always in the same order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.convert import floats
from moec.compiler.kernels.cuda.attention.latents.block import WIDTH
from moec.compiler.kernels.cuda.attention.latents.parts import MOST_PARTS, LatentPlan, results
from moec.compiler.kernels.cuda.attention.operands import LOWEST, Operands, settled
from moec.compiler.kernels.cuda.attention.prefill.softmax import inverse_total
from moec.compiler.kernels.cuda.attention.where import locate
from moec.compiler.kernels.cuda.primitives import (
    LANES,
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
AT_ONCE = 6
"""Parts that a warp reads before it adds the first: what it waits for is memory."""


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
    with launch((columns, spec.query_heads, operands.tokens), LANES * WARPS) as (
        (piece, head, token),
        thread,
    ):
        warp, lane = T.bind(thread // i32(LANES)), T.bind(thread % i32(LANES))
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
            column = T.bind(piece * i32(COLUMNS) + lane * i32(4))
            add = _sums(plan, memory, row, active, warp, column)
            facts = _facts(plan, memory, row, active, lane)
            sync()  # all is on its way before anyone waits for the first: the compiler keeps to that
            highest, total = _totals(*facts)
            sums = add(highest)
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


def _facts(plan: LatentPlan, memory: Buffer, row: Expr, active: Expr, lane: Expr) -> tuple[Buffer, Buffer]:
    """The maxima and totals of this lane's parts."""
    count = MOST_PARTS // LANES
    highest, totals = registers(count), registers(count)
    for number in range(count):
        store(highest, number, T.float32(LOWEST))
        store(totals, number, T.float32(0))
        part = T.bind(lane + i32(LANES * number))
        with when(part < active):
            fact = _fact(plan, row, part)
            store(highest, number, load(memory, fact))
            store(totals, number, load(memory, fact + i64(1)))
    return highest, totals


def _totals(highest: Buffer, totals: Buffer) -> tuple[Expr, Expr]:
    """The maximum over all parts, and the total."""
    count = MOST_PARTS // LANES
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
    plan: LatentPlan, memory: Buffer, row: Expr, active: Expr, warp: Expr, column: Expr
) -> Callable[[Expr], Buffer]:
    """Reads the warp's first parts; what is returned adds up four columns, given the maximum over all parts."""
    spec = plan.spec
    inside = T.bind(T.cast(T.min(column, i32(spec.value_dim - 4)), "int64"))

    def read(first: Expr) -> list[tuple[Expr, list[Expr]]]:
        """A maximum and four columns of so many parts; those beyond the last are read as the last."""
        found = []
        for number in range(AT_ONCE):
            part = T.bind(T.min(first + i32(number * WARPS), active - i32(1)))
            slot = row + T.cast(part, "int64") * i64(plan.spec.query_heads)
            own = T.bind(load(memory, _fact(plan, row, part)))
            found.append((own, floats(memory, T.bind(slot * i64(spec.value_dim) + inside), 4)))
        return found

    early = read(warp)

    def add(highest: Expr) -> Buffer:
        sums = registers(4)
        for number in range(4):
            store(sums, number, T.float32(0))

        def several(first: Expr, found: list[tuple[Expr, list[Expr]]]) -> None:
            for number, (own, four) in enumerate(found):
                with when(first + i32(number * WARPS) < active):
                    weight = value("float32", "exp2", own - highest)
                    for place in range(4):
                        store(sums, place, load(sums, place) + weight * four[place])

        several(warp, early)
        together = WARPS * AT_ONCE
        with T.serial(i32(1), (active + i32(together - 1)) // i32(together)) as step:
            first = T.bind(step * i32(together) + warp)
            several(first, read(first))
        return sums

    return add
