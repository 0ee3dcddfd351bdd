"""Choices beyond an expert's capacity lose their weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.emit import (
    Argument,
    arguments,
    build,
    i64,
    keep,
    load,
    loop,
    registers,
    scratch,
    store,
    symbol,
    when,
)

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import ExpertsLayer
    from moec.compiler.kernels.emit import Buffer, Expr


def capacity(name: str, layer: ExpertsLayer) -> tirx.PrimFunc:
    """The kernel of a ``capacity`` step, ``(index [T, K] int64, weight [T, K], token_call [T] int32, out [T, K])``.

    ``token_call`` has for each token the number in the step of the first token of its call; a call's tokens are
    consecutive. One thread counts: a few thousand tokens take microseconds.

    Args:
        name: of the function.
        layer: how many experts there are, and how many tokens of one call each of them takes.
    """

    def body() -> None:
        operands = declare(layer)
        taken = scratch(layer.experts, "int64")
        bounds = registers(2, "int64")
        store(bounds, 0, i64(0))
        with T.While(load(bounds, 0) < operands.count):
            first = keep(load(bounds, 0))
            find_end(operands, first, bounds)
            end = keep(load(bounds, 1))
            most = keep(tokens_taken(layer, end - first))
            with loop(layer.experts) as expert:
                store(taken, expert, i64(0))
            for choice in range(layer.top_k):
                with loop(end - first) as token:
                    place = keep((first + token) * i64(layer.top_k) + i64(choice))
                    chosen = keep(load(operands.index, place))
                    number = keep(load(taken, chosen) + i64(1))
                    store(taken, chosen, number)
                    kept = T.Select(number <= most, load(operands.weight, place), T.float32(0.0))
                    store(operands.out, place, kept)
            store(bounds, 0, end)

    return build(name, body)


@dataclass(frozen=True)
class CapacityOperands:
    """The tensors of one call of a ``capacity`` kernel, flat."""

    index: Buffer
    weight: Buffer
    calls: Buffer
    out: Buffer
    count: Expr
    """Tokens of the step, int64."""


def declare(layer: ExpertsLayer) -> CapacityOperands:
    """Declare the arguments of a ``capacity`` kernel."""
    count = symbol("T")
    index, weight, calls, out = arguments(
        Argument("index", (count, layer.top_k), "int64"),
        Argument("weight", (count, layer.top_k), "float32"),
        Argument("token_call", (count,), "int32"),
        Argument("out", (count, layer.top_k), "float32"),
    )
    return CapacityOperands(index, weight, calls, out, count)


def find_end(operands: CapacityOperands, first: Expr, bounds: Buffer) -> None:
    """Set ``bounds[1]`` to the end of the call that begins with token ``first`` (int64)."""
    last = operands.count - i64(1)
    store(bounds, 1, first + i64(1))
    going = registers(2, "int64")
    store(going, 0, i64(1))
    with T.While(T.And(load(going, 0) > i64(0), load(bounds, 1) < operands.count)):
        call = i64(load(operands.calls, T.min(load(bounds, 1), last)))
        store(going, 0, T.Select(call.equal(first), i64(1), i64(0)))
        with when(load(going, 0) > i64(0)):
            store(bounds, 1, load(bounds, 1) + i64(1))


def tokens_taken(layer: ExpertsLayer, tokens: Expr) -> Expr:
    """Tokens of a call of ``tokens`` that an expert takes, int64."""
    if layer.capacity:
        return i64(layer.capacity)
    return T.cast(T.ceil(T.cast(tokens, "float64") * T.float64(layer.capacity_share)), "int64")
