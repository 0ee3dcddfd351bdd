"""What the threads of a block find together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.primitives import LANES, shared, sync, value
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr


@dataclass(frozen=True)
class Block:
    """A block's thread number and memory for exchange; every method is called by all of its threads."""

    thread: Expr
    threads: int
    scores: Buffer = field(default_factory=lambda: shared(LANES))
    entries: Buffer = field(default_factory=lambda: shared(LANES, "int32"))
    wides: Buffer = field(default_factory=lambda: shared(LANES, "uint64"))

    @property
    def lane(self) -> Expr:
        """Number of the thread within its warp."""
        return T.bind(T.truncmod(self.thread, T.int32(LANES)))

    @property
    def warp(self) -> Expr:
        """Number of the thread's warp."""
        return T.bind(T.truncdiv(self.thread, T.int32(LANES)))

    def best(self, score: Expr, entry: Expr) -> tuple[Expr, Expr]:
        """The largest score and its entry, the lowest where several have it; in every thread."""
        lane, warp, warps = self.lane, self.warp, self.threads // LANES
        score, entry = warp_best(score, entry, lane)
        sync()
        with when(lane == T.int32(0)):
            store(self.scores, warp, score)
            store(self.entries, warp, entry)
        sync()
        place = T.bind(T.min(lane, T.int32(warps - 1)))
        return warp_best(T.bind(load(self.scores, place)), T.bind(load(self.entries, place)), lane)

    def scan(self, amount: Expr) -> tuple[Expr, Expr]:
        """uint64: what the threads before this one have, and what all have."""
        lane, warp, warps = self.lane, self.warp, self.threads // LANES
        amount = settle(amount)
        own = warp_scan(amount, lane)
        sync()
        with when(lane == T.int32(LANES - 1)):
            store(self.wides, warp, own)
        sync()
        mine = T.bind(load(self.wides, T.min(lane, T.int32(warps - 1))))
        sums = warp_scan(settle(T.Select(lane < T.int32(warps), mine, T.uint64(0))), lane)
        total = settle(value("uint64", "shuffle_wide", sums, T.int32(LANES - 1)))
        before = settle(value("uint64", "shuffle_wide", sums, warp - T.int32(1)))
        return settle(T.Select(warp > T.int32(0), before, T.uint64(0)) + own - amount), total


def warp_best(score: Expr, entry: Expr, lane: Expr) -> tuple[Expr, Expr]:
    """The largest score of a warp and the lowest entry that has it, in every lane."""
    step = LANES // 2
    while step:
        other = settle(value("float32", "shuffle_xor", score, T.int32(step)))
        place = settle(value("int32", "shuffle_int", entry, lane ^ T.int32(step)))
        better = settle(T.Or(other > score, T.And(other == score, place < entry)))
        score, entry = settle(T.Select(better, other, score)), settle(T.Select(better, place, entry))
        step //= 2
    return score, entry


def warp_scan(amount: Expr, lane: Expr) -> Expr:
    """uint64: what this lane and those before it have."""
    step = 1
    while step < LANES:
        other = settle(value("uint64", "shuffle_wide", amount, lane - T.int32(step)))
        amount = settle(amount + T.Select(lane >= T.int32(step), other, T.uint64(0)))
        step *= 2
    return amount
