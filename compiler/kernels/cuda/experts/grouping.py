"""Pairs of a token and a chosen expert in order of their experts: one launch.

Every block looks at all pairs for its own expert, so that nothing depends on which block is first: the same input
gives the same order. Within an expert, pairs keep theirs.
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

WARPS = 32
THREADS = WARPS * LANES
TURN = 6
"""Loads of a lane that are under way together."""


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
    order: Buffer
    """int32 ``[P]``: the token at each place."""
    places: Buffer
    """int32 ``[P]``: the place of each pair."""
    spans: Buffer
    """int32 ``[E, 2]``: each expert's first place, and how many are its own."""


def emit_grouping(grouping: Grouping) -> None:
    """Emit the launch."""
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
        with when(thread == i32(0)):
            span = T.bind(i64(expert) * i64(2))
            store(grouping.spans, span, start)
            store(grouping.spans, span + i64(1), size)
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
