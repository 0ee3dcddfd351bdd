"""Flash attention with Hopper's products of four warps: 128 query rows of a block, 64 for each of two such groups.

While a tile's values are added, the next tile's scores are computed and turned to weights, so that the tensor cores
wait for exponentials as little as can be. Tiles are copied one step ahead: two of keys and two of values are in shared
memory. Every warp has all columns of its 16 rows: sums and softmax are those of `softmax`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.prefill.softmax import Sums, cap, hide, rescale, weigh_scores
from moec.compiler.kernels.cuda.many.panels import (
    ROW_BYTES,
    WARPGROUP,
    Panels,
    add_columns,
    hold,
    multiply_rows,
)
from moec.compiler.kernels.cuda.primitives import call, i32, pack, registers, shared_dynamic, sync, value
from moec.compiler.kernels.emit import Buffer, Expr, either, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cuda.attention.rows import Bounds

ROWS, KEYS = 128, 128
"""Query rows of a block, and keys of a tile."""
THREADS = 2 * WARPGROUP
MOST_SHARED_BYTES = 227 << 10


class Tiles(Protocol):
    """Where keys and values come from, a tile at a time."""

    def copy_keys(self, tile: Expr, target: Panels, stage: Expr) -> None:
        """Start to copy a tile's keys; ``stage`` is the byte offset from ``target``."""

    def copy_values(self, tile: Expr, target: Panels, stage: Expr) -> None:
        """Start to copy a tile's values."""

    def first_position(self, tile: Expr) -> Expr:
        """Of its keys."""

    def whole(self, tile: Expr) -> Expr:
        """Whether all rows see all its keys."""


@dataclass(frozen=True)
class Memory:
    """A block's shared memory: queries, and the first of two tiles each of keys and values."""

    queries: Panels
    keys: Panels
    values: Panels
    thread: Expr
    descriptions: tuple[Expr, Expr, Expr]
    """Of the group's queries, and of the first tiles."""


def shared_bytes(spec: AttentionSpec) -> int:
    """What a block needs."""
    return _layout(spec, None)[2].end + 2 * KEYS * spec.value_dim


def fits(spec: AttentionSpec) -> bool:
    """Whether these kernels take the attention's shape."""
    sizes = spec.key_dim % 64 == 0 and spec.value_dim in (64, 128)
    return spec.dtype == "float16" and sizes and shared_bytes(spec) <= MOST_SHARED_BYTES


def _layout(spec: AttentionSpec, memory: Buffer | None) -> tuple[Panels, Panels, Panels]:
    queries = Panels(memory, 0, ROWS, spec.key_dim)
    keys = Panels(memory, queries.end, KEYS, spec.key_dim)
    return queries, keys, Panels(memory, keys.end + 2 * KEYS * spec.key_dim, KEYS, spec.value_dim)


def allocate(spec: AttentionSpec, thread: Expr) -> Memory:
    """Take the memory."""
    memory = shared_dynamic(shared_bytes(spec), align=1024)
    queries, keys, values = _layout(spec, memory)
    group = value("int32", "shuffle_int", T.bind(thread // i32(WARPGROUP)), i32(0))
    own = T.bind(group * i32(ROWS // 2 * ROW_BYTES))
    descriptions = (queries.described(own), keys.described(), values.described())
    return Memory(queries, keys, values, thread, descriptions)


def attend(
    spec: AttentionSpec, memory: Memory, sums: Sums, tiles: Tiles, span: tuple[Expr, Expr], bounds: Bounds
) -> None:
    """Attend to the tiles ``span[0] .. span[1]``, at least one; queries have been written by all threads."""
    low, high = span
    scores, weights = registers(4 * KEYS // 8), registers(KEYS // 4, "uint32")
    key_bytes, value_bytes = 2 * KEYS * spec.key_dim, 2 * KEYS * spec.value_dim

    def copy_ahead(tile: Expr, step: Expr, *, keys: int, values: int) -> None:
        """Keys of a tile so many on, and values of one, into their places; ``step`` is this tile's number."""
        with when(tile + i32(keys) <= high):
            stage = T.bind((step + i32(keys)) % i32(2) * i32(key_bytes))
            tiles.copy_keys(T.bind(tile + i32(keys)), memory.keys, stage)
        with when(tile + i32(values) <= high):
            stage = T.bind((step + i32(values)) % i32(2) * i32(value_bytes))
            tiles.copy_values(T.bind(tile + i32(values)), memory.values, stage)
        call("copy_commit")

    def weigh(tile: Expr, *, masked: bool) -> list[Expr]:
        cap(spec, scores)
        if masked:
            hide(sums, scores, bounds, T.bind(tiles.first_position(tile)))
        return weigh_scores(sums, scores)

    def step_on(tile: Expr, step: Expr, *, masked: bool) -> None:
        """Add a tile's values while the next one's scores become weights: there must be no branch in between."""
        hold(sums.values)
        _start_scores(memory, scores, T.bind(step + i32(1)), key_bytes)
        _start_values(memory, sums, weights, step, value_bytes)
        call("wgmma_wait", i32(1))
        hold(scores)
        scales = weigh(T.bind(tile + i32(1)), masked=masked)
        # Every weight is part of a total: the compiler would move exponentials behind the wait.
        call("after", T.bind(load(sums.total, 0) + load(sums.total, 1)))
        call("wgmma_wait", i32(0))
        hold(sums.values)
        rescale(sums, scales)
        _pack(spec, scores, weights)

    tiles.copy_keys(low, memory.keys, i32(0))
    call("copy_commit")
    _arrive()
    copy_ahead(low, i32(0), keys=1, values=0)
    _start_scores(memory, scores, i32(0), key_bytes)
    call("wgmma_wait", i32(0))
    hold(scores)
    rescale(sums, weigh(low, masked=True))
    _pack(spec, scores, weights)
    with T.serial(i32(0), high - low) as step:
        tile = T.bind(low + step)
        _arrive()
        copy_ahead(tile, step, keys=2, values=1)
        either(
            T.bind(tiles.whole(T.bind(tile + i32(1)))),
            partial(step_on, tile, step, masked=False),
            partial(step_on, tile, step, masked=True),
        )
    _arrive()
    hold(sums.values)
    call("wgmma_fence")
    _start_values(memory, sums, weights, T.bind(high - low), value_bytes)
    call("wgmma_wait", i32(0))
    hold(sums.values)
    sync()


def _arrive() -> None:
    """What was copied can be read by products, and what products have read can be written to."""
    call("copy_wait", i32(0))
    call("fence_async")
    sync()


def _start_scores(memory: Memory, scores: Buffer, step: Expr, stage_bytes: int) -> None:
    queries, keys, _ = memory.descriptions
    stage = T.bind(keys + T.cast(step % i32(2), "uint64") * T.uint64(stage_bytes // 16))
    call("wgmma_fence")
    multiply_rows("float16", scores, queries, stage, (memory.queries, memory.keys))
    call("wgmma_commit")


def _start_values(memory: Memory, sums: Sums, weights: Buffer, step: Expr, stage_bytes: int) -> None:
    stage = T.bind(memory.descriptions[2] + T.cast(step % i32(2), "uint64") * T.uint64(stage_bytes // 16))
    add_columns(sums.values, weights, stage, memory.values)
    call("wgmma_commit")


def _pack(spec: AttentionSpec, scores: Buffer, weights: Buffer) -> None:
    """Weights as the left operand of products: four words for 16 keys."""
    for number in range(KEYS // 4):
        store(weights, number, pack(spec.dtype, load(scores, 2 * number), load(scores, 2 * number + 1)))
