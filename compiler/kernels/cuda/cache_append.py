"""Write the keys and values of a step's tokens into their pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.cache import PAGE_TOKENS
from moec.compiler.kernels.cpu.emit import (
    Argument,
    Buffer,
    Expr,
    arguments,
    build,
    div,
    i64,
    load,
    mod,
    symbol,
)
from moec.compiler.kernels.cpu.numeric import saturate_f16
from moec.compiler.kernels.cuda.threads import threads, write

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import AttentionSpec


def cache_append(spec: AttentionSpec) -> tirx.PrimFunc:
    """The kernel ``cache_append_<attention>``; arguments as in ``kernels/cpu/cache_append.py``."""

    def body() -> None:
        tokens, pages, sequences, width = symbol("T"), symbol("pages"), symbol("B"), symbol("M")
        step, cache = (1, tokens, spec.kv_heads), (pages, spec.kv_heads, PAGE_TOKENS)
        k, v, k_cache, v_cache, table, sequence, position = arguments(
            Argument("k", (*step, spec.key_dim), "float32"),
            None if spec.latent else Argument("v", (*step, spec.value_dim), "float32"),
            Argument("k_cache", (*cache, spec.key_dim), spec.dtype),
            None if spec.latent else Argument("v_cache", (*cache, spec.value_dim), spec.dtype),
            Argument("page_table", (sequences, width), "int32"),
            Argument("token_sequence", (tokens,), "int32"),
            Argument("token_position", (tokens,), "int32"),
        )
        for source, target, size in ((k, k_cache, spec.key_dim), (v, v_cache, spec.value_dim)):
            if source is None:
                continue
            with threads(tokens * i64(spec.kv_heads * size)) as number:
                row = T.bind(div(number, size))
                token, head = T.bind(div(row, spec.kv_heads)), T.bind(mod(row, spec.kv_heads))
                place = T.bind(T.cast(load(position, token), "int64"))
                slot = cache_row(table, width, load(sequence, token), place, spec.kv_heads, head)
                value = load(source, number)
                if spec.dtype == "float16":
                    value = saturate_f16(value, 1)
                write(target, spec.dtype, slot * i64(size) + mod(number, size), value)

    return build(f"cache_append_{spec.name}", body)


def cache_row(table: Buffer, width: Expr, sequence: Expr, place: Expr, heads: int, head: Expr) -> Expr:
    """Row of the cache that holds position ``place`` of a sequence for one key head."""
    page = T.cast(load(table, T.cast(sequence, "int64") * width + div(place, PAGE_TOKENS)), "int64")
    return T.bind((page * i64(heads) + head) * i64(PAGE_TOKENS) + mod(place, PAGE_TOKENS))
