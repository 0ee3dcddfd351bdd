"""The tiles of work that an order of pairs by their experts makes, listed by one block beside others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.primitives import LANES, i32
from moec.compiler.kernels.emit import i64, load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr

SLOT_WORDS = 4
"""uint32 values of one entry of the list: the expert's address (0: no work), first place, end of its places."""
EVEN_ROWS = 8
"""Tiles of one expert that are to be as large as each other are multiples of this."""


@dataclass(frozen=True)
class TileList:
    """Sizes and buffers; P pairs, E experts."""

    pairs: Expr
    experts: Expr
    """int64 both."""
    rows: int
    """The most places of a tile, a multiple of 8."""
    even: bool
    """Whether an expert's tiles are about as large as each other, not all but the last full."""
    table: Buffer
    """int64 ``[E]``: the experts' addresses."""
    spans: Buffer
    """int32 ``[E, 2]``: each expert's first place, and how many are its own."""
    entries: Buffer
    """uint32 ``[slots, 4]``, see ``SLOT_WORDS``: the tiles of each expert in order, then entries without work."""

    @property
    def slots(self) -> Expr:
        """Entries: so many tiles there can be, whatever is chosen; int64."""
        return tirx.truncdiv(self.pairs, i64(self.rows)) + self.experts

    def emit(self, thread: Expr, threads: int) -> None:
        """Emit what one block of so many threads does."""
        _Listing(self, thread, threads).fill()


class _Listing:
    """The list while a block emits it; every thread has an expert of its own at a time."""

    def __init__(self, tiles: TileList, thread: Expr, threads: int) -> None:
        self.tiles, self.rows, self.thread, self.threads = tiles, i32(tiles.rows), thread, threads
        self.lane, self.warp = T.bind(thread % i32(LANES)), T.bind(thread // i32(LANES))
        self.totals = cuda.shared(threads // LANES, "int32")

    def fill(self) -> None:
        """All entries."""
        tiles, experts = self.tiles, i32(self.tiles.experts)
        listed = cuda.registers(1, "int32")
        store(listed, 0, i32(0))
        with T.serial(i32(0), tirx.truncdiv(experts + i32(self.threads - 1), i32(self.threads))) as turn:
            expert = T.bind(turn * i32(self.threads) + self.thread)
            span, address = cuda.registers(2, "int32"), cuda.registers(1, "int64")
            for word in range(2):
                store(span, word, i32(0))
            store(address, 0, i64(0))
            with when(expert < experts):
                for word in range(2):
                    store(span, word, load(tiles.spans, i64(expert) * i64(2) + i64(word)))
                store(address, 0, load(tiles.table, i64(expert)))
            start, size = T.bind(load(span, 0)), T.bind(load(span, 1))
            count = T.bind(tirx.truncdiv(size + self.rows - i32(1), self.rows))
            before, every = self._sums_before(count)
            self._expert(T.bind(load(address, 0)), load(listed, 0) + before, count, (start, size))
            store(listed, 0, load(listed, 0) + every)
        limit = T.bind(i32(tiles.slots))
        left = T.bind(limit - load(listed, 0))
        with T.serial(i32(0), tirx.truncdiv(left + i32(self.threads - 1), i32(self.threads))) as turn:
            entry = T.bind(load(listed, 0) + turn * i32(self.threads) + self.thread)
            with when(entry < limit):
                self._entry(entry, i64(0), i32(0), i32(0))

    def _sums_before(self, number: Expr) -> tuple[Expr, Expr]:
        """The sum of the numbers of threads before this one, and of all."""
        up_to = number
        for step in (1, 2, 4, 8, 16):
            other = cuda.value("int32", "shuffle_int", up_to, T.max(self.lane - i32(step), i32(0)))
            up_to = T.bind(up_to + T.Select(self.lane >= i32(step), other, i32(0)))
        cuda.sync()
        with when(self.lane == i32(LANES - 1)):
            store(self.totals, self.warp, up_to)
        cuda.sync()
        sums = cuda.registers(2, "int32")
        store(sums, 0, up_to - number)
        store(sums, 1, i32(0))
        for warp in range(self.threads // LANES):
            own = T.bind(load(self.totals, warp))
            store(sums, 0, load(sums, 0) + T.Select(i32(warp) < self.warp, own, i32(0)))
            store(sums, 1, load(sums, 1) + own)
        return T.bind(load(sums, 0)), T.bind(load(sums, 1))

    def _expert(self, address: Expr, first: Expr, count: Expr, span: tuple[Expr, Expr]) -> None:
        """An expert's entries from ``first`` on; it is at ``address``."""
        first, (start, size) = T.bind(first), span
        own = tirx.truncdiv(size + count - i32(1), T.max(count, i32(1)))
        even = tirx.truncdiv(own + i32(EVEN_ROWS - 1), i32(EVEN_ROWS)) * i32(EVEN_ROWS)
        each, end = T.bind(even if self.tiles.even else self.rows), T.bind(start + size)
        with T.serial(i32(0), count) as number:
            place = T.bind(start + number * each)
            used = T.Select(place < end, address, i64(0))
            self._entry(first + number, used, place, T.min(place + each, end))

    def _entry(self, number: Expr, address: Expr, place: Expr, end: Expr) -> None:
        words = [T.cast(address, "uint32"), T.cast(address >> i64(32), "uint32")]
        words += [T.cast(value, "uint32") for value in (place, end)]
        cuda.call("store_16", cuda.element(self.tiles.entries, i64(number) * i64(SLOT_WORDS)), *words)
