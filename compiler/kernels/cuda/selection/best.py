"""The bits of a token's best positions, found by a block: the least rank of them digit by digit, then a page a word.

A digit is eight bits: a histogram of the ranks that begin with the digits found so far says which is the next. Of equal
ranks the earlier positions are taken: warps have pages one after the other, and know how many those before have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cuda.block import Block
from moec.compiler.kernels.cuda.primitives import LANES, element, i32, registers, shared, sync, value
from moec.compiler.kernels.cuda.selection.ranks import pages_of
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import Buffer, Expr, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import SelectionSpec
    from moec.compiler.kernels.cuda.selection.ranks import Ranks
    from moec.compiler.kernels.selection_arguments import SelectionOperands

DIGIT_BITS, DIGITS = 8, 4
BINS = 1 << DIGIT_BITS
"""Also the fewest threads of a block: one looks at each bin."""
AT_ONCE = 4
"""Ranks that a lane reads before it uses one."""


def select_all(operands: SelectionOperands, token: Expr, count: Expr, thread: Expr, threads: int) -> None:
    """Select all ``count`` positions (int32)."""
    words = settle(i32(operands.words))
    with T.serial(i32(0), (words + i32(threads - 1)) // i32(threads)) as turn:
        word = settle(turn * i32(threads) + thread)
        bits = settle(T.max(T.min(count - word * i32(PAGE_TOKENS), i32(PAGE_TOKENS)), i32(0)))
        with when(word < words):
            _put(operands, token, word, settle(T.cast(_below(bits), "uint32")))


def select(
    spec: SelectionSpec,
    operands: SelectionOperands,
    ranks: Ranks,
    token: Expr,
    count: Expr,
    thread: Expr,
    threads: int,
) -> None:
    """Select the ``top_k`` best of ``count`` positions, which are more; the block has just written their ranks."""
    block = Block(thread, threads)
    sync()
    pages = pages_of(count)
    least, wanted, equals = _least(spec, ranks, pages, block)
    words = settle(i32(operands.words))
    warps = threads // LANES
    first = settle(block.warp * pages // i32(warps))
    end = settle((block.warp + i32(1)) * pages // i32(warps))
    taken = registers(1, "int32")
    store(taken, 0, i32(0))
    with when(equals > wanted):
        store(taken, 0, _equal_before(ranks, least, first, end, block))
    with T.serial(i32(0), (end - first + i32(AT_ONCE - 1)) // i32(AT_ONCE)) as turn:
        begin = settle(first + turn * i32(AT_ONCE))
        for number, rank in enumerate(_of_pages(ranks, begin, end, block)):
            page = settle(begin + i32(number))
            with when(page < end):
                equal = value("uint32", "ballot", rank.equal(least))
                own = equal & T.cast(_below(block.lane), "uint32")
                place = load(taken, 0) + value("int32", "count_bits", own)
                chosen = T.Or(rank > least, T.And(rank.equal(least), place < wanted))
                bits = value("uint32", "ballot", T.bind(chosen))
                store(taken, 0, load(taken, 0) + value("int32", "count_bits", equal))
                with when(block.lane.equal(i32(0))):
                    _put(operands, token, page, bits)
    rest = T.max(words - pages + i32(threads - 1), i32(0)) // i32(threads)
    with T.serial(i32(0), rest) as turn:
        word = settle(pages + turn * i32(threads) + thread)
        with when(word < words):
            _put(operands, token, word, T.uint32(0))
    sync()


def _of_pages(ranks: Ranks, begin: Expr, end: Expr, block: Block) -> list[Expr]:
    """The lane's ranks in `AT_ONCE` pages from ``begin`` on, all read before one is used; beyond ``end`` the last."""
    held = registers(AT_ONCE, "uint32")
    for number in range(AT_ONCE):
        page = T.min(begin + i32(number), end - i32(1))
        store(held, number, ranks.get(page * i32(PAGE_TOKENS) + block.lane))
    return [T.bind(load(held, number)) for number in range(AT_ONCE)]


def _least(spec: SelectionSpec, ranks: Ranks, pages: Expr, block: Block) -> tuple[Expr, Expr, Expr]:
    """The least rank (uint32) among the best, how many positions that have it are among them, and how many have it."""
    bins, found = shared(BINS, "int32"), shared(3, "int32")
    least, wanted = registers(1, "uint32"), registers(1, "int32")
    store(least, 0, T.uint32(0))
    store(wanted, 0, i32(spec.top_k))
    for digit in range(DIGITS):
        shift = DIGIT_BITS * (DIGITS - 1 - digit)
        with when(block.thread < i32(BINS)):
            store(bins, block.thread, i32(0))
        sync()
        _count(ranks, pages, block, bins, load(least, 0), shift)
        sync()
        bin_number = settle(i32(BINS - 1) - T.min(block.thread, i32(BINS - 1)))
        amount = settle(T.Select(block.thread < i32(BINS), load(bins, bin_number), i32(0)))
        before, _ = block.scan(T.cast(amount, "uint64"))
        above = settle(T.cast(before, "int32"))
        with when(T.And(above < load(wanted, 0), above + amount >= load(wanted, 0))):
            for place, number in enumerate((bin_number, above, amount)):
                store(found, place, number)
        sync()
        store(least, 0, load(least, 0) | (T.cast(load(found, 0), "uint32") << T.uint32(shift)))
        store(wanted, 0, load(wanted, 0) - load(found, 1))
    return settle(load(least, 0)), settle(load(wanted, 0)), settle(load(found, 2))


def _count(ranks: Ranks, pages: Expr, block: Block, bins: Buffer, prefix: Expr, shift: int) -> None:
    """Count the next digits of the ranks that begin with ``prefix``.

    Ranks of a warp mostly have the same digit: the first lane counts all that have its own. What does not exist has the
    lowest rank, which is never among the best.
    """
    prefix = settle(prefix)
    groups = settle(pages * i32(PAGE_TOKENS // 4))
    with T.serial(i32(0), (groups + i32(block.threads - 1)) // i32(block.threads)) as turn:
        group = settle(turn * i32(block.threads) + block.thread)
        for rank in ranks.four(group, groups):
            begins: Expr = T.bool(True)
            if shift < DIGIT_BITS * (DIGITS - 1):
                beyond = T.uint32(shift + DIGIT_BITS)
                begins = (rank >> beyond).equal(prefix >> beyond)
            counted = settle(T.Select(begins, i32(1), i32(0)))
            digit = settle(T.cast((rank >> T.uint32(shift)) & T.uint32(BINS - 1), "int32"))
            common = value("int32", "shuffle_int", digit, i32(0))
            alike = T.bind(T.And(counted > i32(0), digit.equal(common)))
            together = value("int32", "count_bits", value("uint32", "ballot", alike))
            with when(block.lane.equal(i32(0))):
                _add(bins, common, together)
            with when(T.And(counted > i32(0), digit != common)):
                _add(bins, digit, i32(1))


def _add(bins: Buffer, place: Expr, number: Expr) -> None:
    T.evaluate(T.call_extern("int32", "moec_atomic_add", element(bins, place), number))


def _equal_before(ranks: Ranks, least: Expr, first: Expr, end: Expr, block: Block) -> Expr:
    """How many positions before a warp's pages ``first .. end - 1`` have rank ``least``; int32."""
    held, number = shared(LANES, "int32"), registers(1, "int32")
    store(number, 0, i32(0))
    with T.serial(i32(0), end - first) as turn:
        rank = ranks.get((first + turn) * i32(PAGE_TOKENS) + block.lane)
        equal = value("uint32", "ballot", rank.equal(least))
        store(number, 0, load(number, 0) + value("int32", "count_bits", equal))
    with when(block.lane.equal(i32(0))):
        store(held, block.warp, load(number, 0))
    sync()
    store(number, 0, i32(0))
    with T.serial(i32(0), block.warp) as warp:
        store(number, 0, load(number, 0) + load(held, warp))
    return settle(load(number, 0))


def _below(number: Expr) -> Expr:
    """The lowest ``number`` bits, as int64."""
    return T.shift_left(T.int64(1), T.cast(number, "int64")) - T.int64(1)


def _put(operands: SelectionOperands, token: Expr, word: Expr, bits: Expr) -> None:
    place = T.cast(token, "int64") * operands.words + T.cast(word, "int64")
    store(operands.out, place, T.reinterpret("int32", bits))
