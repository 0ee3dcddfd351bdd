"""What kernels of attention take, in this order on every target: the chain calls the same functions everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.emit import Argument, Buffer, Expr, arguments, symbol

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec


@dataclass(frozen=True)
class Extents:
    """Sizes that are known when a kernel is called, int64."""

    tokens: Expr
    pages: Expr
    sequences: Expr
    width: Expr
    """Pages that a row of the page table has room for."""
    words: Expr
    """Of a token's selection."""

    @classmethod
    def declare(cls) -> Extents:
        """New symbols for them."""
        return cls(*(symbol(name) for name in ("T", "pages", "B", "M", "S")))


@dataclass(frozen=True)
class Appended:
    """The tensors of a step's keys and values and of their pages, flat."""

    k: Buffer
    """Where cross there is none; nor ``v``."""
    v: Buffer | None
    k_cache: Buffer
    v_cache: Buffer | None
    """Where keys are latent there is none, or it is the key cache."""
    table: Buffer
    width: Expr
    sequence: Buffer
    position: Buffer
    """Where cross the last position of the source."""
    tokens: Expr


def attention_arguments(spec: AttentionSpec, extents: Extents, *, workspace: bool) -> list[Argument | None]:
    """Those of ``attention_<name>``; ``None`` for what the spec has not.

    q, k, v, k_cache, v_cache, page_table, token_sequence, token_position, token_last, selection, sinks, bias, the
    matrices of `matrix_arguments`, workspace, out. Shapes: `moec.compiler.kernels.cpu.attention.attention`.
    """
    tokens, heads = extents.tokens, spec.query_heads
    return [
        Argument("q", (1, tokens, heads, spec.query_dim), "float32"),
        *_cached(spec, extents, appends=not spec.cross),
        None if spec.causal or spec.cross else Argument("token_last", (tokens,), "int32"),
        Argument("selection", (tokens, extents.words), "int32") if spec.selected else None,
        Argument("sinks", (heads,), "float32") if spec.sinks else None,
        Argument("bias", (heads, 2 * spec.bias_reach + 1), "float32") if spec.bias_reach else None,
        *matrix_arguments(spec),
        Argument("workspace", (symbol("W"),), "uint8") if workspace else None,
        Argument("out", (1, tokens, heads, spec.result_dim), "float32"),
    ]


def declare_append(spec: AttentionSpec) -> Appended:
    """Declare the arguments of ``append_<name>``: those of the attention from ``k`` to ``token_position``."""
    extents = Extents.declare()
    k, v, k_cache, v_cache, table, sequence, position = arguments(*_cached(spec, extents, appends=True))
    return Appended(k, v, k_cache, v_cache, table, extents.width, sequence, position, extents.tokens)


def matrix_arguments(spec: AttentionSpec) -> list[Argument]:
    """The matrices of the heads that latents stand for; none where there are no such heads."""
    heads, rank = spec.heads, spec.value_dim
    if heads is None:
        return []
    shapes = {
        "absorb": (rank, heads.nope_dim),
        "expand": (heads.nope_dim, rank),
        "value": (heads.value_dim, rank),
    }
    return [Argument(name, (spec.query_heads, *shape), heads.dtype) for name, shape in shapes.items()]


def _cached(spec: AttentionSpec, extents: Extents, *, appends: bool) -> list[Argument | None]:
    """What is appended, the cache, and where in it the tokens are."""
    step = (1, extents.tokens, spec.kv_heads)
    cache = (extents.pages, spec.kv_heads, PAGE_TOKENS)
    return [
        Argument("k", (*step, spec.key_dim), "float32") if appends else None,
        Argument("v", (*step, spec.value_dim), "float32") if appends and not spec.latent else None,
        Argument("k_cache", (*cache, spec.key_dim), spec.dtype),
        None if spec.latent else Argument("v_cache", (*cache, spec.value_dim), spec.dtype),
        Argument("page_table", (extents.sequences, extents.width), "int32"),
        Argument("token_sequence", (extents.tokens,), "int32"),
        Argument("token_position", (extents.tokens,), "int32"),
    ]
