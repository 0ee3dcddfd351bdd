"""Write the keys and values of a step's tokens into their pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.cache import PAGE_TOKENS
from moec.compiler.kernels.cpu.emit import Buffer, Expr, div, i64, load, mod
from moec.compiler.kernels.cpu.numeric import saturate_f16
from moec.compiler.kernels.cuda.threads import threads, write

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cpu.cache_append import Append


def append(spec: AttentionSpec, call: Append) -> None:
    """Emit the launches: one thread a number; see `moec.compiler.kernels.cpu.cache_append`."""
    parts = [(call.k, call.k_cache, spec.key_dim)]
    if call.v is not None:
        parts.append((call.v, call.v_cache, spec.value_dim))
    for source, target, size in parts:
        with threads(call.tokens * i64(spec.kv_heads * size)) as number:
            row = T.bind(div(number, size))
            token, head = T.bind(div(row, spec.kv_heads)), T.bind(mod(row, spec.kv_heads))
            place = T.bind(T.cast(load(call.position, token), "int64"))
            sequence = load(call.sequence, token)
            slot = cache_row(call.table, call.table_width, sequence, place, spec.kv_heads, head)
            value = load(source, number)
            if spec.dtype == "float16":
                value = saturate_f16(value, 1)
            write(target, spec.dtype, slot * i64(size) + mod(number, size), value)


def cache_row(table: Buffer, width: Expr, sequence: Expr, place: Expr, heads: int, head: Expr) -> Expr:
    """Row of the cache that holds position ``place`` of a sequence for one key head."""
    page = T.cast(load(table, T.cast(sequence, "int64") * width + div(place, PAGE_TOKENS)), "int64")
    return T.bind((page * i64(heads) + head) * i64(PAGE_TOKENS) + mod(place, PAGE_TOKENS))
