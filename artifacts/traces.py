"""Routing traces: which experts each token chose, compactly.

A token meets all MoE layers of a decoder. Behind an encoder the tokens of sources meet the encoder's: those are traces
of their own.

Dimension names: N traced tokens (all sequences, one after the other), K chosen experts, E experts, S
sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

WEIGHT_STEPS = 255
"""Routing weights are kept as ``round(255 * weight / largest weight of the token)``, 8 bits each."""


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """One MoE layer's choices."""

    experts: int
    """E; every chosen expert is below it."""
    chosen: npt.NDArray[Any]
    """``[N, K]`` uint8, or uint16 where E is above 256. In a row an expert comes more than once only where one at most
    has a routing weight: the others stand for experts that compute nothing, such as LongCat-Flash's; see `repeats`."""
    weights: npt.NDArray[np.uint8] | None
    """``[N, K]``, see ``WEIGHT_STEPS``; ``None`` where they were not recorded."""
    early: npt.NDArray[Any] | None = None
    """``[M, K]``, as ``chosen``, of the first M tokens: what the layer's router says of the hidden state that the MoE
    layer before was given, likeliest first; ``None`` where it was not asked, as of what is recorded while it runs."""


@dataclass(frozen=True, eq=False)
class Traces:
    """Routing traces of all MoE layers, over the same tokens."""

    layers: tuple[LayerTrace, ...]
    sequence_starts: npt.NDArray[np.int64]
    """``[S]``: where each sequence begins among the N tokens; the first is 0."""
    prefill: npt.NDArray[np.bool_]
    """``[N]``: the token was part of a prompt (and not generated)."""
    encoder: Traces | None = None
    """Of the encoder's MoE layers over the tokens of sources; then ``layers`` are the decoder's."""

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.prefill)


def index_dtype(experts: int) -> type[np.unsignedinteger[Any]]:
    """The smallest element type that holds an expert's index."""
    return np.uint8 if experts <= 256 else np.uint16


def quantize_weights(weights: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Routing weights ``[N, K]`` to 8 bits, relative to the largest of each token; negative ones become 0."""
    values = np.clip(np.asarray(weights, np.float32), 0, None)
    largest = values.max(axis=1, keepdims=True, initial=0)
    scaled = np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)
    quantized: npt.NDArray[np.uint8] = np.round(scaled * WEIGHT_STEPS).astype(np.uint8)
    return quantized


def repeats(chosen: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which choices ``[.., K]`` are an expert that comes before in the same row: nothing is fetched for them."""
    same = chosen[..., :, None] == chosen[..., None, :]
    again: npt.NDArray[np.bool_] = np.tril(same, -1).any(axis=-1)
    return again


def layer_trace(
    experts: int,
    chosen: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    early: npt.ArrayLike | None = None,
) -> LayerTrace:
    """A layer's trace from indices ``[N, K]`` of any integer type, weights ``[N, K]``, and see `LayerTrace.early`."""
    index = np.asarray(chosen)
    assert index.ndim == 2, f"choices are [N, K], not {index.shape}"
    assert index.size == 0 or (index.min() >= 0 and index.max() < experts), "a chosen expert is out of range"
    quantized = None if weights is None else quantize_weights(np.asarray(weights))
    dtype = index_dtype(experts)
    named = None if early is None else np.ascontiguousarray(np.asarray(early).astype(dtype))
    return LayerTrace(experts, np.ascontiguousarray(index.astype(dtype)), quantized, named)


def join_traces(first: Traces, second: Traces) -> Traces:
    """The tokens of both, of the same model; where only one has routing weights they are left out."""
    layers = tuple(
        LayerTrace(
            one.experts,
            np.concatenate([one.chosen, other.chosen]),
            None
            if one.weights is None or other.weights is None
            else np.concatenate([one.weights, other.weights]),
            _joined_early(one, other),
        )
        for one, other in zip(first.layers, second.layers, strict=True)
    )
    starts = np.concatenate([first.sequence_starts, second.sequence_starts + first.tokens])
    encoder = None
    if first.encoder is not None and second.encoder is not None:
        encoder = join_traces(first.encoder, second.encoder)
    return Traces(layers, starts, np.concatenate([first.prefill, second.prefill]), encoder)


def _joined_early(one: LayerTrace, other: LayerTrace) -> npt.NDArray[Any] | None:
    """What routers said early of the tokens of ``one``, and of ``other`` as far as nothing lies between."""
    if one.early is None or other.early is None or len(one.early) < len(one.chosen):
        return one.early
    return np.concatenate([one.early, other.early])


def last_tokens(traces: Traces, most: int) -> Traces:
    """The last sequences of ``traces``, at most ``most`` tokens of each side; of a longer last sequence its end."""
    begin = max(0, traces.tokens - most)
    later = traces.sequence_starts[traces.sequence_starts >= begin]
    begin = int(later[0]) if later.size else begin
    starts = later - begin if later.size else np.zeros(1 if traces.tokens > begin else 0, np.int64)
    layers = tuple(
        LayerTrace(
            layer.experts,
            layer.chosen[begin:],
            None if layer.weights is None else layer.weights[begin:],
            None if layer.early is None or len(layer.early) <= begin else layer.early[begin:],
        )
        for layer in traces.layers
    )
    encoder = None if traces.encoder is None else last_tokens(traces.encoder, most)
    return Traces(layers, starts, traces.prefill[begin:], encoder)


def ends_with(traces: Traces, part: Traces) -> bool:
    """Whether the last tokens of ``traces`` are those of ``part``, of the same model."""
    begin = traces.tokens - part.tokens
    if (
        traces.encoder is not None
        and part.encoder is not None
        and not ends_with(traces.encoder, part.encoder)
    ):
        return False
    return begin >= 0 and all(
        np.array_equal(layer.chosen[begin:], other.chosen)
        for layer, other in zip(traces.layers, part.layers, strict=True)
    )
