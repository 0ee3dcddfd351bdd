"""Which tokens of a step are one sequence's: a *run*, which advances its state from first to last."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.operands import settled
from moec.compiler.kernels.cuda.primitives import (
    i32,
    launch,
    launch_next,
    registers,
    shared,
    sync,
    wait_previous,
)
from moec.compiler.kernels.emit import load, store, when

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moec.compiler.kernels.cpu.states.operands import StateOperands
    from moec.compiler.kernels.emit import Expr


@dataclass(frozen=True)
class Run:
    """Tokens ``first .. end - 1``, the state's row, and the position of the first token; int32."""

    row: Expr
    first: Expr
    end: Expr
    position: Expr


def runs_of_few_tokens(
    operands: StateOperands, blocks: int, threads: int, body: Callable[[Run, Expr, Expr], None]
) -> None:
    """Launch ``blocks`` blocks for each token; those of a run's first one do ``body(run, block, thread)``."""
    with launch((blocks, operands.tokens), threads) as ((block, token), thread):
        launch_next()
        row = settled(load(operands.sequence, token))
        before = load(operands.sequence, T.max(token - i32(1), i32(0)))
        with when(T.Or(token.equal(i32(0)), before != row)):
            run = _run(operands, row, token, _end(operands, row, token))
            wait_previous()
            body(run, block, thread)


def runs_of_rows(
    operands: StateOperands, blocks: int, threads: int, body: Callable[[Run, Expr, Expr], None]
) -> None:
    """Launch ``blocks`` blocks for each row of states; those of a row with a run do ``body(run, block, thread)``."""
    with launch((blocks, operands.rows), threads) as ((block, row), thread):
        launch_next()
        with _found(operands, row, thread, threads) as (first, end), when(first >= i32(0)):
            run = _run(operands, row, first, end)
            wait_previous()
            body(run, block, thread)


def _run(operands: StateOperands, row: Expr, first: Expr, end: Expr) -> Run:
    return Run(row, first, end, settled(load(operands.position, first)))


def _end(operands: StateOperands, row: Expr, first: Expr) -> Expr:
    """The end of the run that begins with ``first``."""
    tokens = i32(operands.tokens)
    end = registers(1, "int32")
    store(end, 0, first + i32(1))
    with T.While(
        T.And(
            load(end, 0) < tokens,
            load(operands.sequence, T.min(load(end, 0), tokens - i32(1))).equal(row),
        )
    ):
        store(end, 0, load(end, 0) + i32(1))
    return settled(load(end, 0))


@contextmanager
def _found(operands: StateOperands, row: Expr, thread: Expr, threads: int) -> Iterator[tuple[Expr, Expr]]:
    """First token and end of a row's run, found by all threads of a block; -1 where the step has none."""
    tokens = i32(operands.tokens)
    places = shared(2, "int32")
    with when(thread.equal(i32(0))):
        store(places, 0, i32(-1))
    sync()
    with T.serial(i32(0), (tokens + i32(threads - 1)) // i32(threads)) as turn:
        token = settled(turn * i32(threads) + thread)
        with when(token < tokens), when(load(operands.sequence, token).equal(row)):
            before = load(operands.sequence, T.max(token - i32(1), i32(0)))
            after = load(operands.sequence, T.min(token + i32(1), tokens - i32(1)))
            with when(T.Or(token.equal(i32(0)), before != row)):
                store(places, 0, token)
            with when(T.Or(token.equal(tokens - i32(1)), after != row)):
                store(places, 1, token + i32(1))
    sync()
    yield settled(load(places, 0)), settled(load(places, 1))
