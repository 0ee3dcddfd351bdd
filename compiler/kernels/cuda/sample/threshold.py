"""Where a row is cut: the bin in which a sum from the top reaches a number, then the score within it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words.sampling import BINS
from moec.compiler.kernels.cuda.primitives import call, element, registers, shared, sync, value
from moec.compiler.kernels.cuda.sample.operands import (
    LOWEST,
    Operands,
    bin_of,
    key_of,
    mass_of,
    score_of,
)
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import i64, load, loop, store, when

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moec.compiler.kernels.cuda.block import Block
    from moec.compiler.kernels.emit import Buffer, Expr

DIGIT_BITS = 8
DIGITS = 1 << DIGIT_BITS
AHEAD = 8
"""Scores that a thread asks for before it looks at them."""
PLACE, ABOVE, HERE = range(3)
"""What a search leaves in shared memory: where the sum is reached, the sum before, and what that place adds."""


@dataclass(frozen=True)
class Row:
    """A row that is drawn, the block that does it, and the block's memory."""

    operands: Operands
    block: Block
    row: Expr
    largest: Expr
    found: Buffer
    """uint64 ``[3]``: `PLACE`, `ABOVE`, `HERE`."""
    digits: Buffer
    """uint64 ``[DIGITS]``."""
    listed: Buffer
    """int32 ``[1]``: keys in the row's list."""

    def at(self, number: int) -> Expr:
        """What the last search found."""
        return settle(load(self.found, number))


def memory() -> tuple[Buffer, Buffer, Buffer]:
    """The shared memory of a `Row`."""
    return shared(4, "uint64"), shared(DIGITS, "uint64"), shared(1, "int32")


def count_of(row: Row, bin_: Expr) -> Expr:
    """Entries of a bin, uint64."""
    return T.cast(load(row.operands.integers, row.operands.count(row.row, bin_)), "uint64")


def mass_in(row: Row, bin_: Expr) -> Expr:
    """Mass of a bin."""
    return load(row.operands.wides, row.operands.mass(row.row, bin_))


def reach_bin(row: Row, amount: Callable[[Row, Expr], Expr], target: Expr) -> None:
    """Find the bin in which the sum from the best one on reaches ``target``; leaves the last bin where none does."""
    block = row.block
    first, amounts = _own_bins(row, amount)
    before, _ = block.scan(_sum(amounts))
    with when(block.thread == T.int32(0)):
        store(row.found, PLACE, T.uint64(BINS - 1))
    sync()
    for k, here in enumerate(amounts):
        _leave(row, T.cast(first + T.int32(k), "uint64"), before, here, target)
        before = settle(before + here)
    sync()


def sum_bins(row: Row, amount: Callable[[Row, Expr], Expr]) -> Expr:
    """The sum over all bins, in every thread."""
    return row.block.scan(_sum(_own_bins(row, amount)[1]))[1]


def _own_bins(row: Row, amount: Callable[[Row, Expr], Expr]) -> tuple[Expr, list[Expr]]:
    """The thread's first bin, and what its bins have."""
    each = BINS // row.block.threads
    first = settle(row.block.thread * T.int32(each))
    return first, [settle(amount(row, first + T.int32(k))) for k in range(each)]


def _sum(amounts: list[Expr]) -> Expr:
    own = amounts[0]
    for other in amounts[1:]:
        own = own + other
    return own


def _leave(row: Row, place: Expr, before: Expr, here: Expr, target: Expr) -> None:
    with when(T.And(before < target, target <= before + here)):
        for number, found in ((PLACE, place), (ABOVE, before), (HERE, here)):
            store(row.found, number, found)


def gather(row: Row, bin_: Expr, least: Expr) -> None:
    """List the keys of a bin, those that are at least ``least``, in any order."""
    operands, block = row.operands, row.block
    sync()
    with when(block.thread == T.int32(0)):
        store(row.listed, 0, T.int32(0))
    sync()
    with loop(operands.entries // (AHEAD * block.threads)) as step:
        scores = registers(AHEAD)
        first = settle(T.cast(step, "int32") * T.int32(AHEAD * block.threads) + block.thread)
        with T.unroll(T.int32(0), T.int32(AHEAD)) as part:
            entry = first + part * T.int32(block.threads)
            store(scores, part, load(operands.floats, operands.score(row.row, entry)))
        with T.unroll(T.int32(0), T.int32(AHEAD)) as part:
            score = settle(load(scores, part))
            with when(T.And(score > T.float32(LOWEST), bin_of(row.largest, score) == bin_)):
                key = key_of(score)
                with when(key >= least):
                    number = value("int32", "atomic_add", element(row.listed, 0), T.int32(1))
                    store(operands.integers, operands.listed(row.row, number), T.reinterpret("int32", key))
    sync()


def listed_mass(row: Row, least: Expr) -> Expr:
    """Mass of the list's keys that are at least ``least``, in every thread."""
    own = registers(1, "uint64")
    store(own, 0, T.uint64(0))
    with _own_keys(row) as key, when(key >= least):
        store(own, 0, load(own, 0) + mass_of(row.largest, score_of(key)))
    return row.block.scan(settle(load(own, 0)))[1]


def select(row: Row, target: Expr, *, by_mass: bool) -> Expr:
    """The key in the list at which the sum of masses, or the number, from the largest on reaches ``target``.

    The digits of the key are found one after the other. `ABOVE` is left as what is to be reached by keys equal to
    it, `HERE` as what these have.

    Args:
        row: its list holds such a key.
        target: uint64, from 1.
        by_mass: whether masses or keys are counted.
    """
    state = registers(2, "uint32")
    left = registers(1, "uint64")
    store(state, 0, T.uint32(0))
    store(left, 0, target)
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        prefix = settle(load(state, 0))
        _count_digits(row, prefix, shift, by_mass)
        _reach_digit(row, settle(load(left, 0)))
        store(state, 0, prefix | (T.cast(row.at(PLACE), "uint32") << T.uint32(shift)))
        store(left, 0, load(left, 0) - row.at(ABOVE))
    sync()
    with when(row.block.thread == T.int32(0)):
        store(row.found, ABOVE, load(left, 0))
    sync()
    return settle(load(state, 0))


def _count_digits(row: Row, prefix: Expr, shift: int, by_mass: bool) -> None:
    """Sum up the keys that begin with ``prefix`` by their next digit."""
    block = row.block
    sync()
    with when(block.thread < T.int32(DIGITS)):
        store(row.digits, block.thread, T.uint64(0))
    sync()
    digit_now, sum_now = registers(1, "int32"), registers(1, "uint64")
    store(digit_now, 0, T.int32(0))
    store(sum_now, 0, T.uint64(0))
    known = (0xFFFFFFFF << (shift + DIGIT_BITS)) & 0xFFFFFFFF

    def flush() -> None:
        with when(load(sum_now, 0) > T.uint64(0)):
            call("atomic_add_wide", element(row.digits, settle(load(digit_now, 0))), load(sum_now, 0))

    with _own_keys(row) as key, when((key & T.uint32(known)) == prefix):
        digit = settle(T.cast((key >> T.uint32(shift)) & T.uint32(DIGITS - 1), "int32"))
        with when(digit != load(digit_now, 0)):
            flush()
            store(digit_now, 0, digit)
            store(sum_now, 0, T.uint64(0))
        amount = mass_of(row.largest, score_of(key)) if by_mass else T.uint64(1)
        store(sum_now, 0, load(sum_now, 0) + amount)
    flush()
    sync()


def _reach_digit(row: Row, target: Expr) -> None:
    block = row.block
    digit = settle(T.max(T.int32(DIGITS - 1) - block.thread, T.int32(0)))
    inside = settle(block.thread < T.int32(DIGITS))
    here = settle(T.Select(inside, load(row.digits, digit), T.uint64(0)))
    before, _ = block.scan(here)
    _leave(row, T.cast(digit, "uint64"), before, here, target)
    sync()


@contextmanager
def _own_keys(row: Row) -> Iterator[Expr]:
    """A loop over the thread's keys of the list."""
    block = row.block
    count = settle(load(row.listed, 0))
    rounds = T.truncdiv(count - block.thread + T.int32(block.threads - 1), T.int32(block.threads))
    with loop(T.cast(rounds, "int64")) as step:
        number = settle(step * i64(block.threads) + T.cast(block.thread, "int64"))
        bits = load(row.operands.integers, row.operands.listed(row.row, number))
        yield settle(T.reinterpret("uint32", bits))
