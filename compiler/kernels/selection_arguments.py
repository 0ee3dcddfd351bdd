"""What kernels that select positions take, in this order on every target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.attention_arguments import Appended, Extents
from moec.compiler.kernels.emit import Argument, Buffer, Expr, arguments, symbol

if TYPE_CHECKING:
    from moec.artifacts.model import SelectionSpec


@dataclass(frozen=True)
class IndexKeys:
    """What is cached, in the words of an attention: one key a token, for all heads."""

    key_dim: int
    dtype: str
    kv_heads: int = 1
    value_dim: int = 0
    latent: bool = True


@dataclass(frozen=True)
class SelectionOperands:
    """The tensors of one call of ``selection_<selection>``, flat."""

    query: Buffer
    weight: Buffer
    appended: Appended
    workspace: Buffer | None
    out: Buffer
    words: Expr
    """Of a token's selection, int64."""

    @property
    def tokens(self) -> Expr:
        """Of the step, int64."""
        return self.appended.tokens


def declare(spec: SelectionSpec, *, workspace: bool) -> SelectionOperands:
    """Declare the arguments of ``selection_<selection>`` in their order.

    ``query [1, T, H, D]``, ``weight [1, T, H]``, ``key [1, T, D]``, ``cache [pages, 1, P, D]``, ``page_table [B, M]``
    int32, ``token_sequence [T]`` int32, ``token_position [T]`` int32, ``workspace`` uint8 (where there is one), ``out
    [T, W]`` int32. The cache is of the spec's dtype, query, weight and key are float32. See ``SelectionStep`` for the
    bits of ``out``.
    """
    extents = Extents.declare()
    tokens = extents.tokens
    query, weight, key, cache, table, sequence, position, memory, out = arguments(
        Argument("query", (1, tokens, spec.heads, spec.dim), "float32"),
        Argument("weight", (1, tokens, spec.heads), "float32"),
        Argument("key", (1, tokens, spec.dim), "float32"),
        Argument("cache", (extents.pages, 1, PAGE_TOKENS, spec.dim), spec.dtype),
        Argument("page_table", (extents.sequences, extents.width), "int32"),
        Argument("token_sequence", (tokens,), "int32"),
        Argument("token_position", (tokens,), "int32"),
        Argument("workspace", (symbol("workspace_bytes"),), "uint8") if workspace else None,
        Argument("out", (tokens, extents.words), "int32"),
    )
    appended = Appended(key, None, cache, None, table, extents.width, sequence, position, tokens)
    return SelectionOperands(query, weight, appended, memory, out, extents.words)
