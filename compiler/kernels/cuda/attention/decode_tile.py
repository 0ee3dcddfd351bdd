"""A warp's 16 keys and values, straight from memory into the tensor cores' operands.

Lane 4g + t of a warp loads dimensions 8t to 8t + 7 of every 32 of key g, which are its part of two products if the
queries' dimensions are put in the same order; and dimensions 8g to 8g + 7 of every 64 of the values 2t and 2t + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.cache import PAGE_TOKENS
from moec.compiler.kernels.cpu.emit import Buffer, Expr, either, i64, load, store
from moec.compiler.kernels.cuda.attention.convert import floats, stored
from moec.compiler.kernels.cuda.attention.decode_plan import TILE, Plan
from moec.compiler.kernels.cuda.attention.where import Where
from moec.compiler.kernels.cuda.primitives import call, element, i32

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cuda.attention.operands import Operands


@dataclass(frozen=True)
class Held:
    """A lane's registers for a tile."""

    keys: Buffer
    """Key g, then key 8 + g: 4 words each for every 32 dimensions."""
    values: Buffer
    """Values 2t, 2t + 1, 2t + 8, 2t + 9, 4 words each, for every 64 dimensions."""
    page: Buffer
    """Page of the warp's next tile."""


def key_numbers(lane_part: Expr) -> list[Expr]:
    """The four of a tile's keys whose scores, and values, a lane ``4g + t`` has, given t."""
    return [T.bind(lane_part * i32(2) + i32(offset)) for offset in (0, 1, 8, 9)]


def read_page(operands: Operands, where: Where, held: Held, tile: Expr) -> None:
    """Remember the page of a tile of the cache."""
    number = T.cast((where.tile + tile) * i32(TILE) // i32(PAGE_TOKENS), "int64")
    store(held.page, 0, load(operands.table, where.table + number))


def load_keys(
    plan: Plan, operands: Operands, where: Where, held: Held, tile: Expr, lane: tuple[Expr, Expr]
) -> None:
    """Load a tile's keys: from the cache, or those of the step."""
    group, part = lane

    def place(key: Expr, step: int) -> Expr:
        return T.bind(T.cast(key, "int64") * i64(plan.spec.key_dim) + T.cast(part * i32(8) + i32(32 * step), "int64"))

    pieces = plan.spec.key_dim // 8

    def cached() -> None:
        rows = _cached_rows(plan, where, held, tile, [group, group + i32(8)])
        for number, row in enumerate(rows):
            for step in range(plan.key_steps):
                target = element(held.keys, 4 * (number * plan.key_steps + step))
                _where_inside(
                    part + i32(4 * step),
                    pieces,
                    4 * step + 4,
                    lambda target=target, row=row, step=step: call(
                        "load_stream", target, element(operands.k_cache, place(row, step))
                    ),
                )

    def own() -> None:
        token = T.bind(_own_token(where, group))
        row = T.bind(T.cast(token, "int64") * i64(plan.spec.kv_heads) + T.cast(where.head, "int64"))
        for step in range(plan.key_steps):
            start = 4 * step
            _where_inside(
                part + i32(4 * step),
                pieces,
                4 * step + 4,
                lambda start=start, step=step: _put(held.keys, start, plan, operands.k, place(row, step)),
            )
        for word in range(4 * plan.key_steps, 8 * plan.key_steps):
            store(held.keys, word, T.uint32(0))

    either(tile < where.cached, cached, own)


def load_values(
    plan: Plan, operands: Operands, where: Where, held: Held, tile: Expr, lane: tuple[Expr, Expr]
) -> None:
    """Load a tile's values; the page is still that of the tile."""
    group, part = lane
    spec = plan.spec
    pieces = spec.value_dim // 8

    def place(key: Expr, step: int, size: int) -> Expr:
        return T.bind(T.cast(key, "int64") * i64(size) + T.cast(group * i32(8) + i32(64 * step), "int64"))

    def cached() -> None:
        size = spec.key_dim if spec.latent else spec.value_dim
        rows = _cached_rows(plan, where, held, tile, key_numbers(part))
        for step in range(plan.value_steps):
            for number, row in enumerate(rows):
                target = element(held.values, 4 * (4 * step + number))
                _where_inside(
                    group + i32(8 * step),
                    pieces,
                    8 * step + 8,
                    lambda target=target, row=row, step=step: call(
                        "load_stream", target, element(operands.v_cache, place(row, step, size))
                    ),
                )

    def own() -> None:
        source, size = (operands.k, spec.key_dim) if operands.v is None else (operands.v, spec.value_dim)
        for number, key in enumerate(key_numbers(part)[:2]):
            token = _own_token(where, key)
            row = T.bind(T.cast(token, "int64") * i64(spec.kv_heads) + T.cast(where.head, "int64"))
            for step in range(plan.value_steps):
                start = 4 * (4 * step + number)
                _where_inside(
                    group + i32(8 * step),
                    pieces,
                    8 * step + 8,
                    lambda start=start, row=row, step=step: _put(
                        held.values, start, plan, source, place(row, step, size)
                    ),
                )
        for step in range(plan.value_steps):
            for word in range(4 * (4 * step + 2), 4 * (4 * step + 4)):
                store(held.values, word, T.uint32(0))

    either(tile < where.cached, cached, own)


def seen(plan: Plan, where: Where, tile: Expr) -> Expr:
    """A bit for each of a tile's 16 keys: whether the token sees it."""
    start = T.bind((where.tile + tile) * i32(TILE))
    below = T.bind(T.max(where.first - start, i32(0)))
    beyond = T.bind(T.max(start + i32(TILE) - where.base, i32(0)))
    everything = T.uint32(0xFFFF)
    cached = ((everything << T.cast(below, "uint32")) & everything) & (
        everything >> T.cast(T.min(beyond, i32(TILE)), "uint32")
    )
    unseen = T.bind(T.max(where.first - where.base, i32(0)))
    count = T.bind(where.token - where.step_first + i32(1))
    own = ((everything << T.cast(unseen, "uint32")) & everything) & (
        (T.uint32(1) << T.cast(count, "uint32")) - T.uint32(1)
    )
    return T.bind(T.Select(tile < where.cached, cached, own))


def _cached_rows(plan: Plan, where: Where, held: Held, tile: Expr, keys: list[Expr]) -> list[Expr]:
    """Rows of the cache for keys of a tile; what is not seen is read from a place that is."""
    page = T.bind(T.cast(load(held.page, 0), "int64"))
    row = T.bind((page * i64(plan.spec.kv_heads) + T.cast(where.head, "int64")) * i64(PAGE_TOKENS))
    start = T.bind((where.tile + tile) * i32(TILE))
    rows = []
    for key in keys:
        place = T.bind(T.max(where.first, T.min(start + key, where.base - i32(1))))
        rows.append(T.bind(row + T.cast(place & i32(PAGE_TOKENS - 1), "int64")))
    return rows


def _own_token(where: Where, key: Expr) -> Expr:
    """The step's token that is key number ``key`` of the own tile; beyond the last one, the last one."""
    return T.bind(T.min(where.step_first + key, where.token))


def _put(target: Buffer, start: int, plan: Plan, source: Buffer, place: Expr) -> None:
    for number, word in enumerate(stored(plan.spec.dtype, floats(source, place, 8))):
        store(target, start + number, word)


def _where_inside(piece: Expr, pieces: int, end: int, emit: Callable[[], None]) -> None:
    """Emit a load of a piece of 8 dimensions; a lane whose piece is outside the row keeps the zeros it began with."""
    if end <= pieces:
        emit()
        return
    with T.If(piece < i32(pieces)), T.Then():
        emit()
