"""Third launch: a block a row finds what top-k and top-p keep, draws, and notes the token as seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import sampling as words
from moec.artifacts.words.sampling import BINS, seen_words
from moec.compiler.kernels.cuda.block import Block
from moec.compiler.kernels.cuda.primitives import launch, launch_next, registers, shared, sync, wait_previous
from moec.compiler.kernels.cuda.sample.draw import Cut, draw
from moec.compiler.kernels.cuda.sample.histogram import best_of_row
from moec.compiler.kernels.cuda.sample.operands import Operands, mass_of, score_of
from moec.compiler.kernels.cuda.sample.philox import uniform
from moec.compiler.kernels.cuda.sample.threshold import (
    ABOVE,
    HERE,
    PLACE,
    Row,
    count_of,
    gather,
    listed_mass,
    mass_in,
    memory,
    reach_bin,
    select,
    sum_bins,
)
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import i64, load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr

THREADS = 1024


def pick(operands: Operands) -> None:
    """Launch a block for each row."""
    with launch((operands.rows,), THREADS) as ((row,), thread):
        block, token, found = Block(thread, THREADS), shared(1, "int32"), memory()
        launch_next()
        wait_previous()
        largest, best = best_of_row(operands, block, row)
        with when(thread == T.int32(0)):
            store(token, 0, best)
        with when(operands.draws(row)):
            _draw(Row(operands, block, row, largest, *found), token)
        sync()
        with when(thread == T.int32(0)):
            _finish(operands, row, settle(load(token, 0)))


def _finish(operands: Operands, row: Expr, token: Expr) -> None:
    store(operands.tokens, T.cast(row, "int64"), T.cast(token, "int64"))
    slot = operands.word(row, words.SLOT)
    with when(slot >= T.int32(0)):
        place = settle(
            T.cast(slot, "int64") * i64(seen_words(operands.vocab)) + T.cast(token >> T.int32(5), "int64")
        )
        bit = T.int32(1) << (token & T.int32(31))
        store(operands.seen, place, load(operands.seen, place) | bit)


def _draw(row: Row, token: Buffer) -> None:
    least, mass, cut = registers(1, "uint32"), registers(1, "uint64"), registers(1, "int32")
    store(least, 0, T.uint32(0))
    store(cut, 0, T.int32(0))
    store(mass, 0, sum_bins(row, mass_in))
    _top_k(row, least, mass)
    _top_p(row, least, mass, cut)
    with when(load(mass, 0) > T.uint64(0)):
        operands = row.operands
        number = uniform(operands.wide(row.row, words.SEED), operands.wide(row.row, words.COUNTER))
        goal = part_of(load(mass, 0), number)
        draw(row, Cut(settle(load(least, 0)), settle(load(cut, 0))), goal, token)


def part_of(mass: Expr, part: Expr) -> Expr:
    """``floor(part * mass)``, below ``mass``; ``part`` float64 from 0 to 1."""
    whole = T.cast(part * T.cast(mass, "float64"), "uint64")
    return settle(T.min(whole, mass - T.uint64(1)))


def _top_k(row: Row, least: Buffer, mass: Buffer) -> None:
    """Raise ``least`` to the key of the k-th largest score; nothing changes where that has no mass."""
    operands = row.operands
    top_k = operands.word(row.row, words.TOP_K)
    with when(T.And(top_k > T.int32(0), top_k < T.int32(operands.vocab))):
        target = settle(T.cast(top_k, "uint64"))
        reach_bin(row, count_of, target)
        bin_, above = settle(T.cast(row.at(PLACE), "int32")), row.at(ABOVE)
        with when(bin_ < T.int32(BINS - 1)):
            gather(row, bin_, T.uint32(0))
            key = select(row, settle(target - above), by_mass=False)
            kept = listed_mass(row, key)
            store(least, 0, key)
            store(mass, 0, _mass_above(row, bin_) + kept)


def _mass_above(row: Row, bin_: Expr) -> Expr:
    """Mass of the bins before one."""

    def before(row: Row, place: Expr) -> Expr:
        return T.Select(place < bin_, mass_in(row, place), T.uint64(0))

    return sum_bins(row, before)


def _top_p(row: Row, least: Buffer, mass: Buffer, cut: Buffer) -> None:
    """Cut the least likely tokens; of those equal to the last that stays, the first ``cut`` go too."""
    tail = settle(T.reinterpret("float64", row.operands.wide(row.row, words.TAIL)))
    with when(T.And(tail > T.float64(0), load(mass, 0) > T.uint64(0))):
        whole = settle(load(mass, 0))
        target = settle(whole - part_of(whole, tail))
        reach_bin(row, mass_in, target)
        bin_, above = settle(T.cast(row.at(PLACE), "int32")), row.at(ABOVE)
        gather(row, bin_, settle(load(least, 0)))
        left = settle(target - above)
        key = select(row, left, by_mass=True)
        each, short, all_ = mass_of(row.largest, score_of(key)), row.at(ABOVE), row.at(HERE)
        kept = settle(T.truncdiv(short + each - T.uint64(1), each))
        store(least, 0, key)
        store(cut, 0, T.cast(T.truncdiv(all_, each) - kept, "int32"))
        # What stays: all before the key, and so many equal to it.
        store(mass, 0, target - short + kept * each)
