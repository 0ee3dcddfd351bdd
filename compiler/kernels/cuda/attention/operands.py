"""What every attention kernel on a GPU takes, and where keys and values lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.attention_arguments import Appended, Extents, attention_arguments
from moec.compiler.kernels.cuda.primitives import call, element, i32, pack, registers
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    arguments,
    div,
    i64,
    load,
    mod,
    store,
)

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cpu.cache_append import Cached

LOWEST = -1.0e30
"""The running maximum before the first score."""

HIDDEN = -3.0e38
"""The score of what a token does not see: 2^(HIDDEN - LOWEST) is 0."""

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Projections:
    """The matrices of the heads that latents stand for, see `moec.artifacts.steps.LatentWeights`."""

    absorb: Buffer
    expand: Buffer
    value: Buffer


@dataclass(frozen=True)
class Done:
    """Tokens of the step that other kernels of the same call have attended to."""

    marks: Buffer
    """int32 ``[T]``: not 0 for those."""
    head: Buffer
    """int32: the fourth number says how many are left."""


@dataclass(frozen=True)
class Rounded:
    """Results as a product with a matrix takes them: ``[T, Hq, Dv]`` of a 16-bit type."""

    buffer: Buffer
    dtype: str


@dataclass(frozen=True)
class Operands(Appended):
    """The tensors of one call of an attention."""

    q: Buffer
    last: Buffer
    """The last position that a token sees: its own where causal."""
    sinks: Buffer | None
    bias: Buffer | None
    weights: Projections | None
    workspace: Buffer | None
    out: Buffer
    selected: Buffer | None = None
    """Which positions a token sees: int32 ``[T, words]``, see ``SelectionStep``."""
    words: Expr = None
    done: Done | None = None
    """Which tokens kernels of many tokens may leave out."""
    rounded: Rounded | None = None
    """Where kernels of many tokens put results instead of ``out``."""


def declare(spec: AttentionSpec, *, workspace: bool) -> Operands:
    """Declare the arguments of ``attention_<name>`` in their order."""
    extents = Extents.declare()
    declared = attention_arguments(spec, extents, workspace=workspace)
    (
        q,
        k,
        v,
        k_cache,
        v_cache,
        table,
        sequence,
        position,
        last,
        selected,
        sinks,
        bias,
        *matrices,
        memory,
        out,
    ) = arguments(*declared)
    values = k_cache if spec.latent else v_cache
    weights = Projections(*matrices) if matrices else None
    return Operands(
        k=k,
        v=v,
        k_cache=k_cache,
        v_cache=values,
        table=table,
        width=extents.width,
        sequence=sequence,
        position=position,
        tokens=extents.tokens,
        q=q,
        last=position if last is None else last,
        sinks=sinks,
        bias=bias,
        weights=weights,
        workspace=memory,
        out=out,
        selected=selected,
        words=extents.words,
    )


def store_results(operands: Operands, place: Expr, low: Expr, high: Expr) -> None:
    """Store two neighbouring numbers of a result, from the even element ``place`` on (int64)."""
    if operands.rounded is None:
        call("store_pair", element(operands.out, place), low, high)
    else:
        word = pack(operands.rounded.dtype, low, high)
        call("store_4", element(operands.rounded.buffer, place), word)


def first_seen(spec: AttentionSpec, position: Expr) -> Expr:
    """The first position that a token at ``position`` sees, int32."""
    first: Expr = i32(0)
    if spec.window:
        first = T.max(first, position - i32(spec.window - 1))
    if spec.chunk:
        first = T.max(first, position - tirx.truncmod(position, i32(spec.chunk)))
    return T.bind(first)


def cache_row(operands: Appended, spec: Cached, sequence: Expr, place: Expr, head: Expr) -> Expr:
    """Row of the cache (int64) that holds position ``place`` of a sequence for one key head."""
    number = T.cast(sequence, "int64") * operands.width + div(T.cast(place, "int64"), PAGE_TOKENS)
    page = T.cast(load(operands.table, number), "int64")
    row = page * i64(spec.kv_heads) + T.cast(head, "int64")
    return T.bind(row * i64(PAGE_TOKENS) + mod(T.cast(place, "int64"), PAGE_TOKENS))


def query_scale(spec: AttentionSpec) -> float:
    """What queries are multiplied with: the rest of a score's way to a power of 2 is `exponent`."""
    return spec.scaling / spec.softcap if spec.softcap else spec.scaling * LOG2E


def exponent(spec: AttentionSpec, product: Expr) -> Expr:
    """The power of 2 of a scaled query's product with a key."""
    return T.bind(T.tanh(product) * T.float32(spec.softcap * LOG2E)) if spec.softcap else product


def settled(value: Expr) -> Expr:
    """An int32, computed once, here, so that TVM cannot see what it is.

    Its passes ask an analyzer about every index, which follows bindings and conditions back: 17 seconds in a kernel.
    """
    place = registers(1, "int32")
    store(place, 0, value)
    return T.bind(load(place, 0))
