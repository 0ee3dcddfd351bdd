"""First launch: penalty, forbidden tokens, temperature; the best of each chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import sampling as words
from moec.artifacts.words.sampling import BINS, CHUNK, seen_words
from moec.compiler.kernels.cuda.block import Block
from moec.compiler.kernels.cuda.primitives import launch, launch_next, registers, unroll, wait_previous
from moec.compiler.kernels.cuda.sample.operands import LOWEST, Operands
from moec.compiler.kernels.emit import i64, load, loop, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr

THREADS = 256
EACH = CHUNK // THREADS


def score(operands: Operands) -> None:
    """Launch a block for each chunk of each row."""
    with launch((operands.chunks, operands.rows), THREADS) as ((chunk, row), thread):
        block = Block(thread, THREADS)
        first = T.bind(chunk * T.int32(CHUNK) + thread)
        scores = registers(EACH)
        wait_previous()
        _read(operands, row, first, scores)
        launch_next()
        _clear_bins(operands, row, chunk, thread)
        _penalize(operands, row, first, scores)
        _forbid(operands, row, first, scores)
        with when(operands.draws(row)):
            temperature = operands.real(row, words.TEMPERATURE)
            with unroll(EACH) as step:
                store(scores, step, load(scores, step) / temperature)
        _write(operands, row, first, scores)
        best, entry = block.best(*_own_best(first, scores))
        with when(thread == T.int32(0)):
            store(operands.floats, operands.best_score(row, chunk), best)
            store(operands.integers, operands.best_entry(row, chunk), entry)


def _entry(first: Expr, step: Expr) -> Expr:
    return T.bind(first + step * T.int32(THREADS))


def _read(operands: Operands, row: Expr, first: Expr, scores: Buffer) -> None:
    with unroll(EACH) as step:
        entry = _entry(first, step)
        store(scores, step, T.float32(LOWEST))
        with when(entry < T.int32(operands.vocab)):
            place = T.cast(row, "int64") * i64(operands.vocab) + T.cast(entry, "int64")
            store(scores, step, load(operands.logits, place))


def _clear_bins(operands: Operands, row: Expr, chunk: Expr, thread: Expr) -> None:
    """Zero the row's histogram, a part in each block."""
    parts = operands.chunks * THREADS
    with loop(-(-BINS // parts)) as step:
        bin_ = T.bind(T.cast(step, "int32") * T.int32(parts) + chunk * T.int32(THREADS) + thread)
        with when(bin_ < T.int32(BINS)):
            store(operands.integers, operands.count(row, bin_), T.int32(0))
            store(operands.wides, operands.mass(row, bin_), T.uint64(0))


def _penalize(operands: Operands, row: Expr, first: Expr, scores: Buffer) -> None:
    slot, penalty = operands.word(row, words.SLOT), operands.real(row, words.REPETITION_PENALTY)
    with when(T.And(slot >= T.int32(0), penalty != T.float32(1))), unroll(EACH) as step:
        entry = _entry(first, step)
        with when(entry < T.int32(operands.vocab)):
            place = T.cast(slot, "int64") * i64(seen_words(operands.vocab)) + T.cast(
                entry >> T.int32(5), "int64"
            )
            bits = T.bind(load(operands.seen, place))
            with when(((bits >> (entry & T.int32(31))) & T.int32(1)) != T.int32(0)):
                old = T.bind(load(scores, step))
                store(scores, step, T.Select(old < T.float32(0), old * penalty, old / penalty))


def _forbid(operands: Operands, row: Expr, first: Expr, scores: Buffer) -> None:
    count = operands.word(row, words.FORBIDDEN_COUNT)
    with loop(T.cast(count, "int64")) as number:
        token = operands.word(row, number + i64(words.FORBIDDEN))
        with unroll(EACH) as step:
            old = T.bind(load(scores, step))
            store(scores, step, T.Select(_entry(first, step) == token, T.float32(LOWEST), old))


def _write(operands: Operands, row: Expr, first: Expr, scores: Buffer) -> None:
    """Store the scores, zero without a sign."""
    with unroll(EACH) as step:
        own = T.bind(load(scores, step))
        place = operands.score(row, _entry(first, step))
        store(operands.floats, place, T.Select(own == T.float32(0), T.float32(0), own))


def _own_best(first: Expr, scores: Buffer) -> tuple[Expr, Expr]:
    best, chosen = registers(1), registers(1, "int32")
    store(best, 0, load(scores, 0))
    store(chosen, 0, first)
    with unroll(EACH) as step, when(load(scores, step) > load(best, 0)):
        store(best, 0, load(scores, step))
        store(chosen, 0, _entry(first, step))
    return T.bind(load(best, 0)), T.bind(load(chosen, 0))
