"""The draw: where the sum of masses, in the order of the tokens, passes a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words.sampling import BINS
from moec.compiler.kernels.cuda.block import warp_scan
from moec.compiler.kernels.cuda.primitives import LANES, registers, shared, sync, value
from moec.compiler.kernels.cuda.sample.operands import LOWEST, bin_of, key_of, mass_of, score_of
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import load, loop, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.sample.threshold import Row
    from moec.compiler.kernels.emit import Buffer, Expr

AHEAD = 8
BEGIN, LEFT, EQUALS = range(3)
"""What the search has found: where the part begins, what is left of the number, entries equal to the least before."""


@dataclass(frozen=True)
class Cut:
    """What stays of a row: keys from ``least`` on, without the first ``cut`` of those that equal it."""

    least: Expr
    cut: Expr


def draw(row: Row, cut: Cut, goal: Expr, token: Buffer) -> None:
    """Store in ``token`` the first entry up to which the kept masses sum up to more than ``goal``."""
    state, block = shared(4, "uint64"), row.block
    with when(block.thread == T.int32(0)):
        for number, start in ((BEGIN, T.uint64(0)), (LEFT, goal), (EQUALS, T.uint64(0))):
            store(state, number, start)
    masses, equals = shared(LANES, "uint64"), shared(LANES, "uint64")
    length = row.operands.entries
    for _ in range(2):
        length //= block.threads // LANES
        _narrow(row, cut, (state, masses, equals), length)
    with when(block.warp == T.int32(0)):
        _entry(row, cut, state, length, token)


def _narrow(row: Row, cut: Cut, memory: tuple[Buffer, Buffer, Buffer], length: int) -> None:
    """Of as many parts of ``length`` as the block has warps, find the one in which the number is passed."""
    state, masses, equals = memory
    block = row.block
    lane, warp = block.lane, block.warp
    sync()
    begin = settle(T.cast(load(state, BEGIN), "int32") + warp * T.int32(length))
    mass, equal = _sum_part(row, cut, begin, length, lane)
    with when(lane == T.int32(LANES - 1)):
        store(masses, warp, mass)
        store(equals, warp, equal)
    sync()
    with when(warp == T.int32(0)):
        _choose_part(row, cut, memory, length)
    sync()


def _sum_part(row: Row, cut: Cut, begin: Expr, length: int, lane: Expr) -> tuple[Expr, Expr]:
    """Mass above the least, and entries equal to it, of a warp's part; in the last lane."""
    mass, equal = registers(1, "uint64"), registers(1, "uint64")
    store(mass, 0, T.uint64(0))
    store(equal, 0, T.uint64(0))
    operands, step_length = row.operands, AHEAD * LANES
    with loop(-(-length // step_length)) as step:
        scores = registers(AHEAD)
        with T.unroll(T.int32(0), T.int32(AHEAD)) as part:
            entry = settle(T.cast(step, "int32") * T.int32(step_length) + part * T.int32(LANES) + lane)
            store(scores, part, T.float32(LOWEST))
            with when(entry < T.int32(length)):
                store(scores, part, load(operands.floats, operands.score(row.row, begin + entry)))
        with T.unroll(T.int32(0), T.int32(AHEAD)) as part:
            score = settle(load(scores, part))
            key = key_of(score)
            with when(T.And(_counts(row, score), key >= cut.least)):
                own = mass_of(row.largest, score)
                same = settle(key == cut.least)
                store(mass, 0, load(mass, 0) + T.Select(same, T.uint64(0), own))
                store(equal, 0, load(equal, 0) + T.Select(same, T.uint64(1), T.uint64(0)))
    return warp_scan(settle(load(mass, 0)), lane), warp_scan(settle(load(equal, 0)), lane)


def _counts(row: Row, score: Expr) -> Expr:
    """Whether a score has its place in the histogram: only those can be drawn."""
    return T.And(score > T.float32(LOWEST), bin_of(row.largest, score) < T.int32(BINS - 1))


def _least_mass(row: Row, cut: Cut) -> Expr:
    """Mass of an entry that equals the least."""
    return mass_of(row.largest, settle(T.Select(cut.least > T.uint32(0), score_of(cut.least), row.largest)))


def _kept(cut: Cut, equal: Expr) -> Expr:
    """Of the first ``equal`` entries that equal the least, how many stay."""
    gone = settle(T.cast(cut.cut, "uint64"))
    return settle(T.Select(equal > gone, equal - gone, T.uint64(0)))


def _choose_part(row: Row, cut: Cut, memory: tuple[Buffer, Buffer, Buffer], length: int) -> None:
    """One warp, a lane a part."""
    state, masses, equals = memory
    lane = row.block.lane
    equal = settle(load(equals, lane))
    start, left = settle(load(state, EQUALS)), settle(load(state, LEFT))
    begin = settle(load(state, BEGIN))
    after = settle(start + warp_scan(equal, lane))
    stay = settle(_kept(cut, after) - _kept(cut, settle(after - equal)))
    own = settle(load(masses, lane) + stay * _least_mass(row, cut))
    passed = warp_scan(own, lane)
    before = settle(passed - own)
    with when(T.And(before <= left, left < passed)):
        store(state, BEGIN, begin + T.cast(lane, "uint64") * T.uint64(length))
        store(state, LEFT, left - before)
        store(state, EQUALS, after - equal)


def _entry(row: Row, cut: Cut, state: Buffer, length: int, token: Buffer) -> None:
    """One warp, entry by entry."""
    lane, operands = row.block.lane, row.operands
    left, start = registers(1, "uint64"), registers(1, "uint64")
    store(left, 0, load(state, LEFT))
    store(start, 0, load(state, EQUALS))
    begin = settle(T.cast(load(state, BEGIN), "int32"))
    passed_by = registers(1, "uint64")
    store(passed_by, 0, T.uint64(0))
    with loop(-(-length // LANES)) as step:
        number = settle(T.cast(step, "int32") * T.int32(LANES) + lane)
        score = settle(
            load(
                operands.floats, operands.score(row.row, T.min(begin + number, T.int32(operands.entries - 1)))
            )
        )
        key = key_of(score)
        valid = settle(T.And(number < T.int32(length), _counts(row, score)))
        same = settle(T.And(valid, key == cut.least))
        equal = settle(T.Select(same, T.uint64(1), T.uint64(0)))
        after = settle(load(start, 0) + warp_scan(equal, lane))
        stays = settle(T.And(valid, T.Select(same, after > T.cast(cut.cut, "uint64"), key > cut.least)))
        own = settle(T.Select(stays, mass_of(row.largest, score), T.uint64(0)))
        passed = settle(load(passed_by, 0) + warp_scan(own, lane))
        with when(T.And(passed - own <= load(left, 0), load(left, 0) < passed)):
            store(token, 0, begin + number)
        store(passed_by, 0, value("uint64", "shuffle_wide", passed, T.int32(LANES - 1)))
        store(start, 0, value("uint64", "shuffle_wide", after, T.int32(LANES - 1)))
