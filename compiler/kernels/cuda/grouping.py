"""Pairs of a token and a chosen expert in order of their experts, and the tiles of work that this makes: one launch.

Every block looks at all pairs for its own expert, so that nothing depends on which block is first: the same input
gives the same order. Within an expert, pairs keep theirs. The block that is done last lists the tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.primitives import LANES, i32
from moec.compiler.kernels.emit import i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.emit import Buffer, Expr

WARPS = 16
THREADS = WARPS * LANES
COUNTER = 0
"""Of the blocks, see `primitives.COUNTERS`."""
TURN = 4
"""Loads of a lane that are under way together."""
SLOT_WORDS = 4
"""uint32 values of one entry of the tile list: the expert's address (0: no work), first place, end of its places."""
EVEN_ROWS = 8
"""Tiles of one expert that are to be as large as each other are multiples of this."""


@dataclass(frozen=True)
class Grouping:
    """Sizes and buffers of the sort; P pairs, E experts."""

    index: Buffer
    """int64 ``[P]``; a pair whose index is not an expert is left out."""
    pairs: Expr
    experts: Expr
    """int64 both."""
    chosen: Expr
    """K, int64: pairs of a token."""
    table: Buffer
    """int64 ``[E]``: the experts' addresses."""
    order: Buffer
    """int32 ``[P]``: the token at each place."""
    places: Buffer
    """int32 ``[P]``: the place of each pair."""
    spans: Buffer
    """int32 ``[E, 2]``: each expert's first place, and how many are its own."""
    tiles: Buffer
    """uint32 ``[slots, 4]``, see ``SLOT_WORDS``: the tiles of each expert in order, then entries without work."""


def slots(pairs: Expr, experts: Expr, rows: Expr) -> Expr:
    """Entries of the tile list: so many tiles of at most ``rows`` places there can be, whatever is chosen."""
    return tirx.truncdiv(pairs, rows) + experts


def emit_grouping(grouping: Grouping, rows: Expr, even: Expr) -> None:
    """Emit the launch.

    Args:
        grouping: sizes and buffers.
        rows: the most of a tile, int64, a multiple of 8.
        even: whether an expert's tiles are about as large as each other, not all but the last full; int32, 0 or 1.
    """
    with cuda.launch((grouping.experts,), THREADS) as ((expert,), thread):
        cuda.wait_previous()
        lane, warp = T.bind(thread % i32(LANES)), T.bind(thread // i32(LANES))
        scan = _Scan(grouping, expert, lane, warp)
        before, own = scan.count()
        totals = cuda.shared(2 * WARPS, "int32")
        with when(lane == i32(0)):
            store(totals, warp, before)
            store(totals, warp + i32(WARPS), own)
        cuda.sync()
        sums = cuda.registers(3, "int32")
        for place in range(3):
            store(sums, place, i32(0))
        for number in range(WARPS):
            store(sums, 0, load(sums, 0) + load(totals, i32(number)))
            store(sums, 1, load(sums, 1) + load(totals, i32(WARPS + number)))
            with when(i32(number) < warp):
                store(sums, 2, load(sums, 2) + load(totals, i32(WARPS + number)))
        start, size = T.bind(load(sums, 0)), T.bind(load(sums, 1))
        with when(own > i32(0)):
            scan.place(start + load(sums, 2))
        last = cuda.shared(1, "int32")
        with when(thread == i32(0)):
            span = T.bind(i64(expert) * i64(2))
            store(grouping.spans, span, start)
            store(grouping.spans, span + i64(1), size)
            arrived = cuda.value("bool", "arrives_last", i32(COUNTER), i32(grouping.experts))
            store(last, 0, T.cast(arrived, "int32"))
        cuda.sync()
        with when(load(last, 0) != i32(0)):
            _List(grouping, T.bind(i32(rows)), even, thread).fill()
        cuda.launch_next()


class _Scan:
    """A warp's part of the pairs."""

    def __init__(self, grouping: Grouping, expert: Expr, lane: Expr, warp: Expr) -> None:
        self.grouping, self.expert, self.lane = grouping, T.bind(i64(expert)), lane
        step = THREADS * TURN
        turns = T.bind(i32(tirx.truncdiv(grouping.pairs + i64(step - 1), i64(step))))
        self.turns = turns
        self.first = T.bind(warp * turns * i32(LANES * TURN) + lane)

    def _each(self, use: Callable[[Expr, Expr], None]) -> None:
        """Call ``use`` with the number (int32) and index (-1 beyond the last) of a lane's pairs in order."""
        pairs = T.bind(i32(self.grouping.pairs))
        with T.serial(i32(0), self.turns) as turn:
            found = cuda.registers(TURN, "int64")
            first = T.bind(self.first + turn * i32(LANES * TURN))
            for part in range(TURN):
                store(found, part, i64(-1))
                with when(first + i32(part * LANES) < pairs):
                    store(found, part, load(self.grouping.index, i64(first + i32(part * LANES))))
            for part in range(TURN):
                use(first + i32(part * LANES), load(found, part))

    def count(self) -> tuple[Expr, Expr]:
        """How many of a warp's pairs have an expert before this one, and this one; in every lane."""
        counts = cuda.registers(2, "int32")
        store(counts, 0, i32(0))
        store(counts, 1, i32(0))

        def use(_pair: Expr, index: Expr) -> None:
            earlier = T.And(index >= i64(0), index < self.expert)
            store(counts, 0, load(counts, 0) + T.cast(earlier, "int32"))
            store(counts, 1, load(counts, 1) + T.cast(index == self.expert, "int32"))

        self._each(use)
        return self._warp_sum(load(counts, 0)), self._warp_sum(load(counts, 1))

    def _warp_sum(self, number: Expr) -> Expr:
        number = T.bind(number)
        for step in (16, 8, 4, 2, 1):
            other = cuda.value("int32", "shuffle_int", number, self.lane ^ i32(step))
            number = T.bind(number + other)
        return number

    def place(self, start: Expr) -> None:
        """Write this expert's pairs into the order from ``start`` on."""
        below = T.bind((T.uint32(1) << T.cast(self.lane, "uint32")) - T.uint32(1))
        next_place = cuda.registers(1, "int32")
        store(next_place, 0, start)

        def use(pair: Expr, index: Expr) -> None:
            own = T.bind(index == self.expert)
            votes = cuda.value("uint32", "ballot", own)
            with when(own):
                rank = cuda.value("int32", "count_bits", votes & below)
                place = T.bind(load(next_place, 0) + rank)
                store(self.grouping.order, i64(place), tirx.truncdiv(pair, i32(self.grouping.chosen)))
                store(self.grouping.places, i64(pair), place)
            count = cuda.value("int32", "count_bits", votes)
            store(next_place, 0, load(next_place, 0) + count)

        self._each(use)


class _List:
    """The tile list while the last block emits it; every thread has an expert of its own at a time."""

    def __init__(self, grouping: Grouping, rows: Expr, even: Expr, thread: Expr) -> None:
        self.grouping, self.rows, self.even, self.thread = grouping, rows, even, thread
        self.lane, self.warp = T.bind(thread % i32(LANES)), T.bind(thread // i32(LANES))
        self.totals = cuda.shared(WARPS, "int32")

    def fill(self) -> None:
        """All entries."""
        grouping, experts = self.grouping, i32(self.grouping.experts)
        listed = cuda.registers(1, "int32")
        store(listed, 0, i32(0))
        with T.serial(i32(0), tirx.truncdiv(experts + i32(THREADS - 1), i32(THREADS))) as turn:
            expert = T.bind(turn * i32(THREADS) + self.thread)
            span, address = cuda.registers(2, "int32"), cuda.registers(1, "int64")
            for word in range(2):
                store(span, word, i32(0))
            store(address, 0, i64(0))
            with when(expert < experts):
                for word in range(2):
                    store(span, word, load(grouping.spans, i64(expert) * i64(2) + i64(word)))
                store(address, 0, load(grouping.table, i64(expert)))
            start, size = T.bind(load(span, 0)), T.bind(load(span, 1))
            tiles = T.bind(tirx.truncdiv(size + self.rows - i32(1), self.rows))
            before, every = self._sums_before(tiles)
            self._expert(T.bind(load(address, 0)), load(listed, 0) + before, tiles, (start, size))
            store(listed, 0, load(listed, 0) + every)
        limit = T.bind(i32(slots(grouping.pairs, grouping.experts, i64(self.rows))))
        left = T.bind(limit - load(listed, 0))
        with T.serial(i32(0), tirx.truncdiv(left + i32(THREADS - 1), i32(THREADS))) as turn:
            entry = T.bind(load(listed, 0) + turn * i32(THREADS) + self.thread)
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
        for warp in range(WARPS):
            own = T.bind(load(self.totals, warp))
            store(sums, 0, load(sums, 0) + T.Select(i32(warp) < self.warp, own, i32(0)))
            store(sums, 1, load(sums, 1) + own)
        return T.bind(load(sums, 0)), T.bind(load(sums, 1))

    def _expert(self, address: Expr, first: Expr, tiles: Expr, span: tuple[Expr, Expr]) -> None:
        """An expert's entries from ``first`` on; it is at ``address``."""
        first, (start, size) = T.bind(first), span
        own = T.bind(tirx.truncdiv(size + tiles - i32(1), T.max(tiles, i32(1))))
        even = tirx.truncdiv(own + i32(EVEN_ROWS - 1), i32(EVEN_ROWS)) * i32(EVEN_ROWS)
        each, end = T.bind(T.Select(self.even != i32(0), even, self.rows)), T.bind(start + size)
        with T.serial(i32(0), tiles) as number:
            place = T.bind(start + number * each)
            used = T.Select(place < end, address, i64(0))
            self._entry(first + number, used, place, T.min(place + each, end))

    def _entry(self, number: Expr, address: Expr, place: Expr, end: Expr) -> None:
        words = [T.cast(address, "uint32"), T.cast(address >> i64(32), "uint32")]
        words += [T.cast(value, "uint32") for value in (place, end)]
        cuda.call("store_16", cuda.element(self.grouping.tiles, i64(number) * i64(SLOT_WORDS)), *words)
