"""Tokens beyond an expert's capacity lose their weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.emit import (
    Argument,
    arguments,
    build,
    i64,
    keep,
    load,
    loop,
    scratch,
    store,
    symbol,
    when,
)

if TYPE_CHECKING:
    from tvm import tirx

    from moec.compiler.kernels.cpu.emit import Buffer


def capacity(name: str, *, experts: int, tokens: int) -> tirx.PrimFunc:
    """The kernel of a ``capacity`` step, ``(index [T, 1] int64, weight [T, 1], token_call [T] int32, out [T, 1])``.

    ``token_call`` has for each token the number in the step of the first token of its call; calls do not overlap. One
    thread counts: a few thousand tokens take microseconds.

    Args:
        name: of the function.
        experts: E.
        tokens: of one call that an expert takes.
    """

    def body() -> None:
        index, weight, calls, out, count = capacity_arguments()
        taken = scratch(experts, "int64")
        with loop(count) as token:
            with when(i64(load(calls, token)).equal(token)), loop(experts) as expert:
                store(taken, expert, i64(0))
            chosen = keep(load(index, token))
            number = keep(load(taken, chosen) + i64(1))
            store(taken, chosen, number)
            store(out, token, T.Select(number <= i64(tokens), load(weight, token), T.float32(0.0)))

    return build(name, body)


def capacity_arguments() -> tuple[Buffer, Buffer, Buffer, Buffer, tirx.PrimExpr]:
    """Declare the arguments of a ``capacity`` kernel; with T last."""
    count = symbol("T")
    index, weight, calls, out = arguments(
        Argument("index", (count, 1), "int64"),
        Argument("weight", (count, 1), "float32"),
        Argument("token_call", (count,), "int32"),
        Argument("out", (count, 1), "float32"),
    )
    return index, weight, calls, out, count
