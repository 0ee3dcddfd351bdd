"""The chosen experts of each token, one thread a result: float32 weights, and shapes unfit for tensor cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.experts import layout
from moec.compiler.kernels.cuda.activation import evaluate
from moec.compiler.kernels.cuda.experts.few import names_of_first, part_at
from moec.compiler.kernels.cuda.packed.element import read_element
from moec.compiler.kernels.cuda.threads import read, registers, threads
from moec.compiler.kernels.emit import Buffer, Expr, div, i64, load, loop, mod, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cuda.experts.call import ExpertCall


def plain_bytes(body: ExpertBody, top_k: int) -> tuple[int, int]:
    """Bytes of workspace: always, and for each token of a step."""
    return 0, 4 * top_k * body.intermediate


def emit_experts_plain(body: ExpertBody, call: ExpertCall) -> None:
    """Two launches: one thread for each value between the two products, then one for each result."""
    middle = T.decl_buffer(call.workspace.shape, "float32", data=call.workspace.data, align=64)
    _up(body, call, middle)
    _down(body, call, middle)


def _up(body: ExpertBody, call: ExpertCall, middle: Buffer) -> None:
    size = body.intermediate
    with threads(call.tokens * call.chosen * i64(size)) as number:
        pair, row = T.bind(div(number, size)), T.bind(mod(number, size))
        expert = T.bind(load(call.index, pair))
        with when(call.has(expert)):
            address = T.bind(load(call.table, expert))
            token = T.bind(div(pair, call.chosen))
            values = {
                name: _dot(body, name, address, row, lambda k: load(call.x, token * i64(body.hidden) + k))
                for name in names_of_first(body)
            }
            store(middle, number, evaluate(body.activation, values))


def _down(body: ExpertBody, call: ExpertCall, middle: Buffer) -> None:
    with threads(call.tokens * i64(body.hidden)) as number:
        token, row = T.bind(div(number, body.hidden)), T.bind(mod(number, body.hidden))
        total = registers(1)
        store(total, 0, T.float32(0))
        with loop(call.chosen) as k:
            pair = T.bind(token * call.chosen + k)
            expert = T.bind(load(call.index, pair))
            with when(call.has(expert)):
                address = T.bind(load(call.table, expert))
                start = T.bind(pair * i64(body.intermediate))
                value = _dot(body, "down", address, row, lambda i: load(middle, start + i))
                store(total, 0, load(total, 0) + load(call.weight, pair) * value)
        store(call.out, number, load(total, 0))


def _dot(body: ExpertBody, name: str, address: Expr, row: Expr, value: object) -> Expr:
    """Row ``row`` of a matrix of the expert at ``address`` times a vector, plus the bias where there is one."""
    parts = {part.name: part for part in layout(body).parts}
    columns = body.intermediate if name == "down" else body.hidden
    total = registers(1)
    store(total, 0, T.float32(0))
    matrix = part_at(body, name, address)
    assert callable(value)
    with loop(columns) as k:
        weight = read_element(matrix, body.format or body.dtype, columns, row, T.cast(k, "int32"))
        store(total, 0, load(total, 0) + weight * value(k))
    result = load(total, 0)
    if f"{name}_bias" in parts:
        result = result + read(part_at(body, f"{name}_bias", address), body.dtype, row)
    return T.bind(result)
