"""The chosen experts of each token, read through a table of addresses: slots of the GPU, or mapped host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.experts import layout
from moec.compiler.kernels.cpu.emit import (
    Argument,
    Buffer,
    Expr,
    arguments,
    at_address,
    build,
    div,
    i64,
    load,
    loop,
    mod,
    scratch,
    store,
    symbol,
    when,
)
from moec.compiler.kernels.cuda.activation import evaluate
from moec.compiler.kernels.cuda.threads import read, registers, threads

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody


@dataclass(frozen=True)
class _Call:
    x: Buffer
    index: Buffer
    weight: Buffer
    table: Buffer
    out: Buffer
    tokens: Expr
    chosen: Expr
    count: Expr


def experts(body: ExpertBody) -> tirx.PrimFunc:
    """The kernel ``experts_<body>``; arguments as in ``kernels/cpu/experts.py``.

    Two launches: one thread for each value between the two products, then one for each result.
    """

    def emit() -> None:
        tokens, chosen, count = symbol("T"), symbol("K"), symbol("E")
        x, index, weight, table, out = arguments(
            Argument("x", (tokens, body.hidden), "float32"),
            Argument("index", (tokens, chosen), "int64"),
            Argument("weight", (tokens, chosen), "float32"),
            Argument("table", (count,), "int64"),
            Argument("out", (tokens, body.hidden), "float32"),
        )
        call = _Call(x, index, weight, table, out, tokens, chosen, count)
        middle = scratch(tokens * chosen * i64(body.intermediate))
        _up(body, call, middle)
        _down(body, call, middle)

    return build(f"experts_{body.name}", emit)


def _up(body: ExpertBody, call: _Call, middle: Buffer) -> None:
    size = body.intermediate
    with threads(call.tokens * call.chosen * i64(size)) as number:
        pair, row = T.bind(div(number, size)), T.bind(mod(number, size))
        expert = T.bind(load(call.index, pair))
        with when(tirx.all(expert >= i64(0), expert < call.count)):
            address = T.bind(load(call.table, expert))
            token = T.bind(div(pair, call.chosen))
            values = {
                name: _dot(body, name, address, row, lambda k: load(call.x, token * i64(body.hidden) + k))
                for name in (("gate", "up") if body.gated else ("up",))
            }
            store(middle, number, evaluate(body.activation, values))


def _down(body: ExpertBody, call: _Call, middle: Buffer) -> None:
    with threads(call.tokens * i64(body.hidden)) as number:
        token, row = T.bind(div(number, body.hidden)), T.bind(mod(number, body.hidden))
        total = registers(1)
        store(total, 0, T.float32(0))
        with loop(call.chosen) as k:
            pair = T.bind(token * call.chosen + k)
            expert = T.bind(load(call.index, pair))
            with when(tirx.all(expert >= i64(0), expert < call.count)):
                address = T.bind(load(call.table, expert))
                start = T.bind(pair * i64(body.intermediate))
                value = _dot(body, "down", address, row, lambda i: load(middle, start + i))
                store(total, 0, load(total, 0) + load(call.weight, pair) * value)
        store(call.out, number, load(total, 0))


def _dot(body: ExpertBody, name: str, address: Expr, row: Expr, value: object) -> Expr:
    """Row ``row`` of a matrix of the expert at ``address`` times a vector, plus the bias where there is one."""
    parts = {part.name: part for part in layout(body).parts}
    _, columns = parts[name].shape
    total = registers(1)
    store(total, 0, T.float32(0))
    matrix = _part(body, name, address)
    assert callable(value)
    with loop(columns) as k:
        store(total, 0, load(total, 0) + read(matrix, body.dtype, row * i64(columns) + k) * value(k))
    result = load(total, 0)
    if f"{name}_bias" in parts:
        result = result + read(_part(body, f"{name}_bias", address), body.dtype, row)
    return T.bind(result)


def _part(body: ExpertBody, name: str, address: Expr) -> Buffer:
    part = layout(body).part(name)
    size = 1
    for extent in part.shape:
        size *= extent
    return at_address(address + i64(part.offset_bytes), size, body.dtype)
