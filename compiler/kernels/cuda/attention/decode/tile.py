"""A warp's 16 keys and values, straight from memory into the tensor cores' operands.

Lane 4g + t of a warp loads dimensions 8t to 8t + 7 of every 32 of key g, which are its part of two products if the
queries' dimensions are put in the same order; and dimensions 8g to 8g + 7 of every 64 of the values 2t and 2t + 1.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cuda.attention.convert import floats, stored
from moec.compiler.kernels.cuda.attention.decode.plan import TILE, Plan
from moec.compiler.kernels.cuda.primitives import call, element, i32, registers
from moec.compiler.kernels.emit import Buffer, Expr, either, i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.kernels.cuda.attention.operands import Operands
    from moec.compiler.kernels.cuda.attention.where import Where

PIECE = 8
"""Elements of a load: 16 bytes."""


@dataclass(frozen=True)
class Held:
    """A lane's registers for a tile."""

    keys: Buffer
    """Key g, then key 8 + g: 4 words each for every 32 dimensions."""
    values: Buffer
    """Values 2t, 2t + 1, 2t + 8, 2t + 9, 4 words each, for every 64 dimensions that are held at once."""
    page: Buffer
    """Page of the warp's next tile."""


def hold(plan: Plan) -> Held:
    """Registers, zero: dimensions that a row does not have stay so."""
    keys, values = 8 * plan.key_steps, 16 * plan.value_steps_at_once
    held = Held(registers(keys, "uint32"), registers(values, "uint32"), registers(1, "int32"))
    for buffer, size in ((held.keys, keys), (held.values, values)):
        for place in range(size):
            store(buffer, place, T.uint32(0))
    return held


def key_numbers(lane_part: Expr) -> list[Expr]:
    """The four of a tile's keys whose scores, and values, a lane ``4g + t`` has, given t."""
    return [T.bind(lane_part * i32(2) + i32(offset)) for offset in (0, 1, 8, 9)]


@dataclass(frozen=True)
class Loader:
    """How a lane gets its part of tiles."""

    plan: Plan
    operands: Operands
    where: Where
    held: Held
    group: Expr
    """g, of the lane's number 4g + t."""
    part: Expr
    """t."""

    def page(self, tile: Expr) -> None:
        """Remember the page of a tile of the cache, before its keys and values are loaded."""
        number = T.cast((self.where.tile + tile) * i32(TILE) // i32(PAGE_TOKENS), "int64")
        store(self.held.page, 0, load(self.operands.table, self.where.table + number))

    def keys(self, tile: Expr) -> None:
        """Load a tile's keys: from the cache, or those of the step."""
        if self.plan.spec.cross:
            self._cached_keys(tile)
        else:
            either(tile < self.where.cached, lambda: self._cached_keys(tile), self._own_keys)

    def values(self, tile: Expr, first: int = 0) -> None:
        """Load a tile's values, as many as are held at once from 64 times ``first``."""
        steps = range(first, min(first + self.plan.value_steps_at_once, self.plan.value_steps))
        if self.plan.spec.cross:
            self._cached_values(tile, steps)
            return
        either(
            tile < self.where.cached,
            lambda: self._cached_values(tile, steps),
            lambda: self._own_values(steps),
        )

    def _cached_keys(self, tile: Expr) -> None:
        plan = self.plan
        for number, row in enumerate(self._cached_rows(tile, [self.group, self.group + i32(8)])):
            start = T.bind(row * i64(plan.spec.key_dim) + T.cast(self.part * i32(PIECE), "int64"))
            for step in range(plan.key_steps):
                target = element(self.held.keys, 4 * (number * plan.key_steps + step))
                with _inside(self.part, 4, step, plan.spec.key_dim):
                    call("load_stream", target, element(self.operands.k_cache, start + i64(32 * step)))

    def _own_keys(self) -> None:
        plan = self.plan
        start = T.bind(
            self._own_row(self.group) * i64(plan.spec.key_dim) + T.cast(self.part * i32(PIECE), "int64")
        )
        for step in range(plan.key_steps):
            with _inside(self.part, 4, step, plan.spec.key_dim):
                self._put(self.held.keys, 4 * step, self.operands.k, T.bind(start + i64(32 * step)))
        for word in range(4 * plan.key_steps, 8 * plan.key_steps):
            store(self.held.keys, word, T.uint32(0))

    def _cached_values(self, tile: Expr, steps: range) -> None:
        spec = self.plan.spec
        size = spec.key_dim if spec.latent else spec.value_dim
        inside = T.bind(T.cast(self.group * i32(PIECE), "int64"))
        starts = [T.bind(row * i64(size) + inside) for row in self._cached_rows(tile, key_numbers(self.part))]
        for step in steps:
            for number, start in enumerate(starts):
                target = element(self.held.values, 4 * (4 * (step - steps.start) + number))
                with _inside(self.group, 8, step, spec.value_dim):
                    call("load_stream", target, element(self.operands.v_cache, start + i64(64 * step)))

    def _own_values(self, steps: range) -> None:
        spec, operands = self.plan.spec, self.operands
        source, size = (operands.k, spec.key_dim) if operands.v is None else (operands.v, spec.value_dim)
        for number, key in enumerate(key_numbers(self.part)[:2]):
            start = T.bind(self._own_row(key) * i64(size) + T.cast(self.group * i32(PIECE), "int64"))
            for step in steps:
                place = 4 * (4 * (step - steps.start) + number)
                with _inside(self.group, 8, step, spec.value_dim):
                    self._put(self.held.values, place, source, T.bind(start + i64(64 * step)))
        for step in range(len(steps)):
            for word in range(4 * (4 * step + 2), 4 * (4 * step + 4)):
                store(self.held.values, word, T.uint32(0))

    def _cached_rows(self, tile: Expr, keys: list[Expr]) -> list[Expr]:
        """Rows of the cache for keys of a tile; what is not seen is read from a place that is."""
        where = self.where
        page = T.bind(T.cast(load(self.held.page, 0), "int64"))
        row = T.bind((page * i64(self.plan.spec.kv_heads) + T.cast(where.head, "int64")) * i64(PAGE_TOKENS))
        start = T.bind((where.tile + tile) * i32(TILE))
        rows = []
        for key in keys:
            place = T.bind(T.max(where.first, T.min(start + key, where.base - i32(1))))
            rows.append(T.bind(row + T.cast(place & i32(PAGE_TOKENS - 1), "int64")))
        return rows

    def _own_row(self, key: Expr) -> Expr:
        """Row of k and v for key number ``key`` of the own tile; beyond the last token, the last one."""
        token = T.min(self.where.step_first + key, self.where.token)
        return T.bind(
            T.cast(token, "int64") * i64(self.plan.spec.kv_heads) + T.cast(self.where.head, "int64")
        )

    def _put(self, target: Buffer, start: int, source: Buffer, place: Expr) -> None:
        for number, word in enumerate(stored(self.plan.spec.dtype, floats(source, place, PIECE))):
            store(target, start + number, word)


def seen(where: Where, tile: Expr) -> Expr:
    """A bit for each of a tile's 16 keys: whether the token sees it."""
    start = T.bind((where.tile + tile) * i32(TILE))
    below = T.bind(T.max(where.first - start, i32(0)))
    beyond = T.bind(T.min(T.max(start + i32(TILE) - where.base, i32(0)), i32(TILE)))
    unseen = T.bind(T.max(where.first - where.base, i32(0)))
    count = T.bind(where.token - where.step_first + i32(1))
    everything = T.uint32(0xFFFF)
    cached = (everything << T.cast(below, "uint32")) & (everything >> T.cast(beyond, "uint32"))
    own = (everything << T.cast(unseen, "uint32")) & ((T.uint32(1) << T.cast(count, "uint32")) - T.uint32(1))
    return T.bind(T.Select(tile < where.cached, cached, own))


@contextmanager
def _inside(lane_piece: Expr, pieces: int, step: int, size: int) -> Iterator[None]:
    """Statements for those lanes whose piece of a step of ``pieces`` is inside a row of ``size``."""
    if (step + 1) * pieces * PIECE <= size:
        yield
    else:
        with when(lane_piece < i32(size // PIECE - step * pieces)):
            yield
