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
    keep,
    load,
    loop,
    mod,
    symbol,
)
from moec.compiler.kernels.cpu.machine import Machine
from moec.compiler.kernels.cpu.numeric import narrow_store, saturate_f16

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import AttentionSpec


def cache_append(spec: AttentionSpec, *, lanes: int, name: str | None = None) -> tirx.PrimFunc:
    """The kernel ``cache_append_<attention>``.

    Its arguments: ``k [1, T, Hkv, Dk]``, ``v [1, T, Hkv, Dv]`` (not where latent), ``k_cache [pages, Hkv, P, Dk]``,
    ``v_cache [pages, Hkv, P, Dv]`` (not where latent), ``page_table [B, M]`` int32, ``token_sequence [T]`` int32,
    ``token_position [T]`` int32. P is ``PAGE_TOKENS``; T, B, M and the number of pages are symbolic. ``k`` and ``v``
    are float32 and rounded to the spec's dtype, which the caches have; float16 saturates.
    """
    machine = Machine(lanes)

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
        with loop(tokens * i64(spec.kv_heads)) as row:
            token, head = keep(div(row, spec.kv_heads)), keep(mod(row, spec.kv_heads))
            place = keep(T.cast(load(position, token), "int64"))
            page = page_of(table, width, T.cast(load(sequence, token), "int64"), div(place, PAGE_TOKENS))
            slot = keep((page * i64(spec.kv_heads) + head) * i64(PAGE_TOKENS) + mod(place, PAGE_TOKENS))
            _copy(k, row, k_cache, slot, spec.key_dim, spec.dtype, machine)
            if not spec.latent:
                _copy(v, row, v_cache, slot, spec.value_dim, spec.dtype, machine)

    return build(name or f"cache_append_{spec.name}", body)


def page_of(table: Buffer, width: Expr, sequence: Expr, number: Expr) -> Expr:
    """The page that holds a sequence's ``number``-th ``PAGE_TOKENS`` positions."""
    return keep(T.cast(load(table, sequence * width + number), "int64"))


def _copy(
    source: Buffer, row: Expr, target: Buffer, slot: Expr, size: int, dtype: str, machine: Machine
) -> None:
    """Copy one row of ``size`` elements, rounding each."""
    start, end, lanes = row * i64(size), slot * i64(size), machine.lanes
    whole = size // lanes * lanes

    def move(offset: Expr, width: int) -> None:
        value = load(source, start + offset, width)
        if dtype == "float16":
            value = saturate_f16(value, width)
        narrow_store(target, dtype, end + offset, value, width, native_f16=machine.native_f16)

    with loop(size // lanes) as step:
        move(step * i64(lanes), lanes)
    with loop(size - whole) as rest:
        move(rest + i64(whole), 1)
