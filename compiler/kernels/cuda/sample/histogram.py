"""Second launch, for rows that draw: how many tokens and how much mass lie how far below the best."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words.sampling import BINS, CHUNK
from moec.compiler.kernels.cuda.block import Block
from moec.compiler.kernels.cuda.primitives import (
    call,
    element,
    launch,
    launch_next,
    shared,
    sync,
    wait_previous,
)
from moec.compiler.kernels.cuda.sample.operands import LOWEST, Operands, bin_of, mass_of
from moec.compiler.kernels.emit import load, loop, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr

THREADS = 256
HALF = 20
"""Bits of the lower half of a mass: a chunk's sums of halves fit in 32 bits."""


def histogram(operands: Operands) -> None:
    """Launch a block for each chunk of each row."""
    with launch((operands.chunks, operands.rows), THREADS) as ((chunk, row), thread):
        block = Block(thread, THREADS)
        sums = [shared(BINS, "int32") for _ in range(3)]
        with loop(BINS // THREADS) as step:
            for part in sums:
                store(part, T.cast(step, "int32") * T.int32(THREADS) + thread, T.int32(0))
        launch_next()
        wait_previous()
        with when(operands.draws(row)):
            largest, _ = best_of_row(operands, block, row)
            _count(operands, row, chunk, thread, largest, sums)
            sync()
            _add(operands, row, thread, sums)


def best_of_row(operands: Operands, block: Block, row: Expr) -> tuple[Expr, Expr]:
    """The row's best score and entry, from those of its chunks; a barrier for the block."""
    assert operands.chunks <= block.threads
    mine = T.bind(T.min(block.thread, T.int32(operands.chunks - 1)))
    score = T.bind(load(operands.floats, operands.best_score(row, mine)))
    return block.best(score, T.bind(load(operands.integers, operands.best_entry(row, mine))))


def _count(
    operands: Operands, row: Expr, chunk: Expr, thread: Expr, largest: Expr, sums: list[Buffer]
) -> None:
    with T.unroll(T.int32(0), T.int32(CHUNK // THREADS)) as step:
        entry = chunk * T.int32(CHUNK) + step * T.int32(THREADS) + thread
        score = T.bind(load(operands.floats, operands.score(row, entry)))
        bin_ = bin_of(largest, score)
        with when(T.And(score > T.float32(LOWEST), bin_ < T.int32(BINS - 1))):
            mass = mass_of(largest, score)
            low = T.cast(mass & T.uint64((1 << HALF) - 1), "int32")
            for part, amount in zip(
                sums, (T.int32(1), low, T.cast(mass >> T.uint64(HALF), "int32")), strict=True
            ):
                call("atomic_add", element(part, bin_), amount)


def _add(operands: Operands, row: Expr, thread: Expr, sums: list[Buffer]) -> None:
    """Add the chunk's bins to the row's."""
    with loop(BINS // THREADS) as step:
        bin_ = T.bind(T.cast(step, "int32") * T.int32(THREADS) + thread)
        count, low, high = (T.bind(load(part, bin_)) for part in sums)
        with when(count != T.int32(0)):
            wide = [T.cast(T.cast(half, "uint32"), "uint64") for half in (low, high)]
            call("atomic_add", element(operands.integers, operands.count(row, bin_)), count)
            mass = wide[0] + (wide[1] << T.uint64(HALF))
            call("atomic_add_wide", element(operands.wides, operands.mass(row, bin_)), mass)
