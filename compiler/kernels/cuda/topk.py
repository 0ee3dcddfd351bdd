"""The K largest of each row, in falling order, ties by rising index: what routers choose their experts with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.block import Block, warp_best
from moec.compiler.kernels.cuda.primitives import LANES, launch, launch_next, registers, unroll, wait_previous
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.threads import read, write
from moec.compiler.kernels.emit import (
    Argument,
    Buffer,
    Expr,
    arguments,
    build,
    ceildiv,
    i64,
    load,
    loop,
    store,
    symbol,
    when,
)

if TYPE_CHECKING:
    from tvm import tirx

WARP_ENTRIES = 512
"""Rows up to this length are one warp's, in its registers."""
WARPS = 4
BLOCK_THREADS = 256
_LAST = (1 << 31) - 1


def topk(*, entries: int, count: int, dtype: str) -> tirx.PrimFunc:
    """The kernel ``topk(x [R, entries], values [R, count], indices [R, count] int64)``; R is symbolic.

    In each of ``count`` rounds all threads of a row find the best entry that comes after the last one found. Rows
    longer than `WARP_ENTRIES` are read again in each round.

    Args:
        entries: E, from 1 to 2**31 - 2.
        count: K, from 1 to E.
        dtype: of ``x`` and ``values``: ``bfloat16``, ``float16`` or ``float32``.
    """

    def body() -> None:
        rows = symbol("R")
        x, values, indices = arguments(
            Argument("x", (rows, entries), dtype),
            Argument("values", (rows, count), dtype),
            Argument("indices", (rows, count), "int64"),
        )
        selection = Selection(x, values, indices, entries, count, dtype)
        (_by_warps if entries <= WARP_ENTRIES else _by_blocks)(selection, rows)

    return build("topk", body)


@dataclass(frozen=True)
class Selection:
    """The tensors of a ``topk`` kernel, flat, and its sizes."""

    x: Buffer
    values: Buffer
    indices: Buffer
    entries: int
    count: int
    dtype: str

    def read(self, row: Expr, entry: Expr) -> Expr:
        """One entry as float32."""
        return settle(read(self.x, self.dtype, row * i64(self.entries) + T.cast(entry, "int64")))

    def write(self, row: Expr, number: Expr, value: Expr, entry: Expr) -> None:
        """One result."""
        place = T.bind(row * i64(self.count) + number)
        write(self.values, self.dtype, place, value)
        store(self.indices, place, T.cast(T.min(entry, T.int32(self.entries - 1)), "int64"))


@dataclass(frozen=True)
class Search:
    """A thread's registers: the last found of the row, and its own best after that."""

    last: Buffer
    last_entry: Buffer
    best: Buffer
    best_entry: Buffer

    @classmethod
    def start(cls) -> Search:
        """Before the first round."""
        search = cls(registers(1), registers(1, "int32"), registers(1), registers(1, "int32"))
        store(search.last, 0, T.float32(float("inf")))
        store(search.last_entry, 0, T.int32(-1))
        return search

    def clear(self) -> None:
        """Before each round."""
        store(self.best, 0, T.float32(float("-inf")))
        store(self.best_entry, 0, T.int32(_LAST))

    def offer(self, value: Expr, entry: Expr) -> None:
        """Look at an entry; entries come in rising order."""
        last, last_entry = load(self.last, 0), load(self.last_entry, 0)
        after = T.Or(value < last, T.And(value == last, entry > last_entry))
        first = T.And(value == load(self.best, 0), load(self.best_entry, 0) == T.int32(_LAST))
        with when(T.And(after, T.Or(value > load(self.best, 0), first))):
            store(self.best, 0, value)
            store(self.best_entry, 0, entry)

    def found(self, value: Expr, entry: Expr) -> None:
        """After each round."""
        store(self.last, 0, value)
        store(self.last_entry, 0, entry)


def _by_warps(kernel: Selection, rows: Expr) -> None:
    each = -(-kernel.entries // LANES)
    with launch((ceildiv(rows, WARPS),), WARPS * LANES) as ((number,), thread):
        lane = T.bind(T.truncmod(thread, T.int32(LANES)))
        row = T.bind(
            T.cast(number, "int64") * i64(WARPS) + T.cast(T.truncdiv(thread, T.int32(LANES)), "int64")
        )
        launch_next()
        wait_previous()
        with when(row < rows):
            own, search = registers(each), Search.start()
            with unroll(each) as step:
                entry = T.bind(step * T.int32(LANES) + lane)
                store(own, step, T.float32(float("nan")))
                with when(entry < T.int32(kernel.entries)):
                    store(own, step, kernel.read(row, entry))
            with loop(kernel.count) as place:
                search.clear()
                with unroll(each) as step:
                    search.offer(load(own, step), T.bind(step * T.int32(LANES) + lane))
                value, entry = warp_best(load(search.best, 0), load(search.best_entry, 0), lane)
                search.found(value, entry)
                with when(lane == T.int32(0)):
                    kernel.write(row, place, value, entry)


def _by_blocks(kernel: Selection, rows: Expr) -> None:
    with launch((rows,), BLOCK_THREADS) as ((number,), thread):
        block, row = Block(thread, BLOCK_THREADS), T.bind(T.cast(number, "int64"))
        launch_next()
        wait_previous()
        search = Search.start()
        with loop(kernel.count) as place:
            search.clear()
            with loop(-(-kernel.entries // BLOCK_THREADS)) as step:
                entry = settle(T.cast(step, "int32") * T.int32(BLOCK_THREADS) + thread)
                with when(entry < T.int32(kernel.entries)):
                    search.offer(kernel.read(row, entry), entry)
            value, entry = block.best(load(search.best, 0), load(search.best_entry, 0))
            search.found(value, entry)
            with when(thread == T.int32(0)):
                kernel.write(row, place, value, entry)
