"""Write the keys and values of a step's tokens into their pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.attention_arguments import declare_append
from moec.compiler.kernels.cpu.machine import Machine
from moec.compiler.kernels.cpu.numeric import narrow_store, saturate_f16
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    build,
    div,
    i64,
    keep,
    load,
    loop,
    mod,
)

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.attention_arguments import Appended


class Cached(Protocol):
    """What is cached of a token, e.g. an ``AttentionSpec``."""

    @property
    def kv_heads(self) -> int:
        """Keys and values of a token."""
        ...

    @property
    def key_dim(self) -> int:
        """Entries of a key."""
        ...

    @property
    def value_dim(self) -> int:
        """Entries of a value."""
        ...

    @property
    def dtype(self) -> str:
        """Of both."""
        ...


def append_kernel(spec: AttentionSpec, *, lanes: int) -> tirx.PrimFunc:
    """The kernel ``append_<attention>``: the first arguments of ``attention_<attention>`` from ``k`` on.

    ``k, v, k_cache, v_cache, page_table, token_sequence, token_position``; see
    `moec.compiler.kernels.cpu.attention.attention`.
    """

    def body() -> None:
        append(spec, Machine(lanes), declare_append(spec))

    return build(f"append_{spec.name}", body)


def append(spec: Cached, machine: Machine, call: Appended) -> None:
    """Emit the loop; float32 is rounded to the spec's dtype, and float16 saturates."""
    with loop(call.tokens * i64(spec.kv_heads)) as row:
        token, head = keep(div(row, spec.kv_heads)), keep(mod(row, spec.kv_heads))
        place = keep(T.cast(load(call.position, token), "int64"))
        sequence = T.cast(load(call.sequence, token), "int64")
        page = page_of(call.table, call.width, sequence, div(place, PAGE_TOKENS))
        slot = keep((page * i64(spec.kv_heads) + head) * i64(PAGE_TOKENS) + mod(place, PAGE_TOKENS))
        _copy(call.k, row, call.k_cache, slot, spec.key_dim, spec.dtype, machine)
        if call.v is not None:
            _copy(call.v, row, call.v_cache, slot, spec.value_dim, spec.dtype, machine)


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
