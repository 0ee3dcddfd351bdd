"""Attention over the paged cache, with an online softmax: one thread a token and query head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.cache import PAGE_TOKENS
from moec.compiler.kernels.cpu.cache_append import Append
from moec.compiler.kernels.cpu.emit import (
    Argument,
    Buffer,
    Expr,
    arguments,
    build,
    div,
    i64,
    load,
    loop,
    mod,
    store,
    symbol,
)
from moec.compiler.kernels.cuda.cache_append import append, cache_row
from moec.compiler.kernels.cuda.threads import read, registers, threads

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import AttentionSpec

LOWEST = -3.0e38
"""Below every score: the running maximum before the first one."""


@dataclass(frozen=True)
class _Call:
    q: Buffer
    k_cache: Buffer
    v_cache: Buffer | None
    table: Buffer
    width: Expr
    sequence: Buffer
    position: Buffer
    sinks: Buffer | None
    out: Buffer


def attention(spec: AttentionSpec) -> tirx.PrimFunc:
    """The kernel ``attention_<attention>``; arguments as in ``kernels/cpu/attention.py``."""

    def body() -> None:
        tokens, pages, sequences, width = symbol("T"), symbol("pages"), symbol("B"), symbol("M")
        step, cache = (1, tokens, spec.kv_heads), (pages, spec.kv_heads, PAGE_TOKENS)
        q, k, v, k_cache, v_cache, table, sequence, position, sinks, out = arguments(
            Argument("q", (1, tokens, spec.query_heads, spec.key_dim), "float32"),
            Argument("k", (*step, spec.key_dim), "float32"),
            None if spec.latent else Argument("v", (*step, spec.value_dim), "float32"),
            Argument("k_cache", (*cache, spec.key_dim), spec.dtype),
            None if spec.latent else Argument("v_cache", (*cache, spec.value_dim), spec.dtype),
            Argument("page_table", (sequences, width), "int32"),
            Argument("token_sequence", (tokens,), "int32"),
            Argument("token_position", (tokens,), "int32"),
            Argument("sinks", (spec.query_heads,), "float32") if spec.sinks else None,
            Argument("out", (1, tokens, spec.query_heads, spec.value_dim), "float32"),
        )
        append(spec, Append(k, v, k_cache, v_cache, table, width, sequence, position, tokens))
        call = _Call(q, k_cache, v_cache, table, width, sequence, position, sinks, out)
        with threads(tokens * i64(spec.query_heads)) as row:
            _row(spec, call, row)

    return build(f"attention_{spec.name}", body)


def _row(spec: AttentionSpec, call: _Call, row: Expr) -> None:
    token, head = T.bind(div(row, spec.query_heads)), T.bind(mod(row, spec.query_heads))
    kv_head = T.bind(div(head, spec.query_heads // spec.kv_heads))
    last = T.bind(T.cast(load(call.position, token), "int64"))
    first = T.bind(_first(spec, last))
    highest, total, score, scale = (registers(1) for _ in range(4))
    values = registers(spec.value_dim)
    store(highest, 0, T.float32(LOWEST) if call.sinks is None else load(call.sinks, head))
    store(total, 0, T.float32(0) if call.sinks is None else T.float32(1))
    with loop(spec.value_dim) as d:
        store(values, d, T.float32(0))
    with loop(last - first + i64(1)) as step:
        key = cache_row(
            call.table, call.width, load(call.sequence, token), first + step, spec.kv_heads, kv_head
        )
        _score(spec, call, row, key, score)
        maximum = T.bind(T.max(load(highest, 0), load(score, 0)))
        store(scale, 0, T.exp(load(highest, 0) - maximum))
        store(score, 0, T.exp(load(score, 0) - maximum))
        store(highest, 0, maximum)
        store(total, 0, load(total, 0) * load(scale, 0) + load(score, 0))
        buffer, size = (
            (call.k_cache, spec.key_dim) if call.v_cache is None else (call.v_cache, spec.value_dim)
        )
        with loop(spec.value_dim) as d:
            value = read(buffer, spec.dtype, key * i64(size) + d)
            store(values, d, load(values, d) * load(scale, 0) + load(score, 0) * value)
    with loop(spec.value_dim) as d:
        store(call.out, row * i64(spec.value_dim) + d, load(values, d) / load(total, 0))


def _first(spec: AttentionSpec, last: Expr) -> Expr:
    """The first position that a token at ``last`` sees."""
    first: Expr = i64(0)
    if spec.window:
        first = T.max(first, last - i64(spec.window - 1))
    if spec.chunk:
        first = T.max(first, last - mod(last, spec.chunk))
    return first


def _score(spec: AttentionSpec, call: _Call, row: Expr, key: Expr, score: Buffer) -> None:
    store(score, 0, T.float32(0))
    with loop(spec.key_dim) as d:
        left = load(call.q, row * i64(spec.key_dim) + d)
        store(score, 0, load(score, 0) + left * read(call.k_cache, spec.dtype, key * i64(spec.key_dim) + d))
    scaled = load(score, 0) * T.float32(spec.scaling)
    if spec.softcap:
        scaled = T.float32(spec.softcap) * T.tanh(scaled / T.float32(spec.softcap))
    store(score, 0, scaled)
