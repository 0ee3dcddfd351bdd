"""Attention for any shape and type, one thread a token and query head: correct, and slow."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cuda.attention.bias import bias_of, bias_row
from moec.compiler.kernels.cuda.attention.operands import (
    LOG2E,
    LOWEST,
    Operands,
    cache_row,
    exponent,
    first_seen,
    query_scale,
)
from moec.compiler.kernels.cuda.primitives import i32, launch, launch_next, registers, value, wait_previous
from moec.compiler.kernels.cuda.threads import read
from moec.compiler.kernels.emit import Expr, ceildiv, div, i64, load, loop, mod, store, when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tvm import tirx

    from moec.artifacts.model import AttentionSpec

BLOCK_THREADS = 64


def plain(spec: AttentionSpec, operands: Operands) -> None:
    """Launch the kernel; the step has been appended."""
    rows = operands.tokens * i64(spec.query_heads)
    with launch((ceildiv(rows, BLOCK_THREADS),), BLOCK_THREADS) as ((block,), thread):
        row = T.bind(T.cast(block, "int64") * i64(BLOCK_THREADS) + T.cast(thread, "int64"))
        launch_next()
        wait_previous()
        with when(row < rows):
            _row(spec, operands, row)


def _row(spec: AttentionSpec, operands: Operands, row: Expr) -> None:
    token, head = T.bind(div(row, spec.query_heads)), T.bind(mod(row, spec.query_heads))
    kv_head = T.bind(div(head, spec.query_heads // spec.kv_heads))
    position, last = T.bind(load(operands.position, token)), T.bind(load(operands.last, token))
    bias = None if operands.bias is None else bias_row(spec, T.cast(head, "int32"))
    first = first_seen(spec, last)
    highest, total, values = registers(1), registers(1), registers(spec.value_dim)
    sink = None if operands.sinks is None else load(operands.sinks, head) * T.float32(LOG2E)
    store(highest, 0, T.float32(LOWEST) if sink is None else sink)
    store(total, 0, T.float32(0 if sink is None else 1))
    with loop(spec.value_dim) as d:
        store(values, d, T.float32(0))
    with T.serial(i32(0), last - first + i32(1)) as step, _selected(operands, token, first + step):
        key = cache_row(operands, spec, load(operands.sequence, token), first + step, kv_head)
        score = _score(spec, operands, row, key)
        if operands.bias is not None:
            score = T.bind(score + bias_of(spec, operands.bias, bias, first + step - position))
        maximum = T.bind(T.max(load(highest, 0), score))
        scale = value("float32", "exp2", load(highest, 0) - maximum)
        weight = value("float32", "exp2", score - maximum)
        store(highest, 0, maximum)
        store(total, 0, load(total, 0) * scale + weight)
        size = spec.key_dim if spec.latent else spec.value_dim
        with loop(spec.value_dim) as d:
            held = read(operands.v_cache, spec.dtype, key * i64(size) + d)
            store(values, d, load(values, d) * scale + weight * held)
    with loop(spec.value_dim) as d:
        store(operands.out, row * i64(spec.value_dim) + d, load(values, d) / load(total, 0))


@contextmanager
def _selected(operands: Operands, token: Expr, place: Expr) -> Iterator[None]:
    """Statements for positions that the token's selection has, or for all."""
    if operands.selected is None:
        yield
        return
    word = load(operands.selected, token * operands.words + T.cast(place // i32(PAGE_TOKENS), "int64"))
    bit = T.cast(word, "uint32") >> T.cast(place % i32(PAGE_TOKENS), "uint32")
    with when(T.bitwise_and(bit, T.uint32(1)) != T.uint32(0)):
        yield


def _score(spec: AttentionSpec, operands: Operands, row: Expr, key: Expr) -> tirx.Var:
    score = registers(1)
    store(score, 0, T.float32(0))
    with loop(spec.key_dim) as d:
        left = load(operands.q, row * i64(spec.key_dim) + d) * T.float32(query_scale(spec))
        right = read(operands.k_cache, spec.dtype, key * i64(spec.key_dim) + d)
        store(score, 0, load(score, 0) + left * right)
    return T.bind(exponent(spec, T.bind(load(score, 0))))
