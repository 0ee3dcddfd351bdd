"""The steps of a model's chain, in ``model.json``: what runs in order, on which values and weights.

Dimension names: T tokens of a step of the engine (of all sequences together), K chosen experts, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from moec.artifacts.ids import LayerId, TensorName, ValueId


@dataclass(frozen=True)
class SegmentStep:
    """Run a dense segment."""

    kind: Literal["segment"]
    function: str
    inputs: tuple[ValueId, ...]
    weights: tuple[TensorName, ...]
    outputs: tuple[ValueId, ...]
    side: bool
    """No marker of its stage needs its outputs (shared experts): it may overlap with fetching experts."""


@dataclass(frozen=True)
class LatentWeights:
    """The matrices of ``LatentHeads``, H heads, rank entries of a latent."""

    absorb: TensorName
    """A transposed, ``[H, rank, nope_dim]``: queries to what meets latents."""
    expand: TensorName
    """A, ``[H, nope_dim, rank]``: latents to keys."""
    value: TensorName
    """B, ``[H, value_dim, rank]``: latents, or sums of them, to values."""


@dataclass(frozen=True)
class AttentionStep:
    """Append this step's keys and values to the cache of ``layer``, then attend.

    query ``[1, T, query_heads, query_dim]``, key ``[1, T, kv_heads, key_dim]``, value ``[1, T, kv_heads,
    value_dim]`` (``None`` where latent), output ``[1, T, query_heads, result_dim]``. Where the attention is ``cross``
    there are no key and value, and nothing is appended.
    """

    kind: Literal["attention"]
    attention: str
    layer: LayerId
    query: ValueId
    key: ValueId | None
    value: ValueId | None
    sinks: TensorName | None
    weights: LatentWeights | None
    """Where the attention has ``heads``."""
    output: ValueId
    bias: TensorName | None = None
    """The table ``[query_heads, 2 * bias_reach + 1]``, where the attention has a ``bias_reach``."""
    selection: ValueId | None = None
    """Where the attention is ``selected``: what a `SelectionStep` made."""


@dataclass(frozen=True)
class SelectionStep:
    """Append this step's index keys to the cache of ``layer``, then select positions for each token.

    query ``[1, T, heads, dim]``, weight ``[1, T, heads]``, key ``[1, T, dim]``, output int32 ``[T, W]``: bit b of word
    w says whether position ``32 w + b`` is selected.
    """

    kind: Literal["selection"]
    selection: str
    layer: LayerId
    query: ValueId
    weight: ValueId
    key: ValueId
    output: ValueId


@dataclass(frozen=True)
class AppendStep:
    """Append keys and values of the source to the cache of ``layer``, for ``attention``, which is ``cross``.

    key ``[1, T, kv_heads, key_dim]``, value ``[1, T, kv_heads, value_dim]``.
    """

    kind: Literal["append"]
    attention: str
    layer: LayerId
    key: ValueId
    value: ValueId


@dataclass(frozen=True)
class CapacityStep:
    """Drop tokens beyond an expert's capacity: their weight becomes 0 (Switch, arXiv 2101.03961, section 2.2).

    Of the choices of one call that are the same expert of MoE layer ``layer`` the first ones keep their weight, as many
    as its capacity: first choices of all tokens, in their order, then second ones (GShard, arXiv 2006.16668, algorithm
    1). An encoder's input is one call, and so is a decoder's prompt; each token that follows it is one by itself. index
    ``[T, K]`` int64, weight and output ``[T, K]``.
    """

    kind: Literal["capacity"]
    layer: LayerId
    index: ValueId
    weight: ValueId
    output: ValueId


@dataclass(frozen=True)
class ExpertsStep:
    """Run chosen experts: hidden ``[T, H]``, index ``[T, K]`` int64, weight ``[T, K]``, output ``[T, H]``."""

    kind: Literal["experts"]
    layer: LayerId
    hidden: ValueId
    index: ValueId
    weight: ValueId
    output: ValueId


@dataclass(frozen=True)
class StateStep:
    """Advance the state of ``layer`` by this step's tokens: see `moec.artifacts.states` for operands and results."""

    kind: Literal["state"]
    state: str
    layer: LayerId
    inputs: tuple[ValueId, ...]
    weights: tuple[TensorName, ...]
    output: ValueId


Step: TypeAlias = (
    SegmentStep | AttentionStep | AppendStep | SelectionStep | StateStep | CapacityStep | ExpertsStep
)
