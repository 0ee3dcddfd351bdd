"""Attention, one token at a time, and what latents stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.reference.array import Array


def attention(
    spec: AttentionSpec,
    query: Array,
    keys: Array,
    values: Array,
    position: int,
    sinks: Array | None,
    bias: Array | None = None,
    selected: NDArray[np.bool_] | None = None,
) -> Array:
    """One token's attention.

    Args:
        spec: which positions it sees, and how scores are made.
        query: ``[Hq, Dk]``.
        keys: ``[positions, Hkv, Dk]``, from position 0; all of them are seen where the spec is not causal.
        values: ``[positions, Hkv, Dv]``; ignored where the spec is latent.
        position: the token's.
        sinks: ``[Hq]`` or ``None``.
        bias: ``[Hq, 2 * bias_reach + 1]`` or ``None``.
        selected: ``[position + 1]``, where only some of them are seen.

    Returns:
        ``[Hq, Dv]``.
    """
    first = max(0, position - spec.window + 1) if spec.window else 0
    if spec.chunk:
        first = max(first, position // spec.chunk * spec.chunk)
    end = position + 1 if spec.causal else len(keys)
    distances = np.clip(np.arange(first, end) - position, -spec.bias_reach, spec.bias_reach)
    group = spec.query_heads // spec.kv_heads
    heads = []
    for head in range(spec.query_heads):
        key = keys[first:end, head // group]
        value = key[:, : spec.value_dim] if spec.latent else values[first:end, head // group]
        scores = spec.scaling * (key @ query[head])
        if spec.softcap:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        if bias is not None:
            scores = scores + bias[head, distances + spec.bias_reach]
        if selected is not None:
            scores = np.where(selected[first:], scores, -np.inf)
        largest = scores.max() if sinks is None else max(scores.max(), sinks[head])
        weights = np.exp(scores - largest)
        total = weights.sum() + (0.0 if sinks is None else np.exp(sinks[head] - largest))
        heads.append(weights @ value / total)
    return np.stack(heads)


def expand_latents(
    spec: AttentionSpec, latents: Array, key_weight: Array, value_weight: Array
) -> tuple[AttentionSpec, Array, Array]:
    """What cached latents stand for.

    Args:
        spec: with ``heads``.
        latents: ``[positions, 1, key_dim]`` as they are cached: latent, then the part of the key that heads share.
        key_weight: A ``[Hq, nope_dim, rank]``.
        value_weight: B ``[Hq, value_dim, rank]``.

    Returns:
        The attention of the heads by themselves, their keys ``[positions, Hq, query_dim]`` and values ``[positions,
        Hq, result_dim]``.
    """
    latent, shared = latents[:, 0, : spec.value_dim], latents[:, 0, spec.value_dim :]
    own = np.einsum("pr,hnr->phn", latent, key_weight)
    spread = np.broadcast_to(shared[:, None], (len(latents), spec.query_heads, shared.shape[-1]))
    return spec.expanded, np.concatenate([own, spread], -1), np.einsum("pr,hvr->phv", latent, value_weight)
