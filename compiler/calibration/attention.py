"""Attention and the selection of positions, in torch, one sequence at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moec.compiler.kernels.reference import select

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec, SelectionSpec


def attend(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    selected: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the last tokens of one sequence to all of it, straight from ``AttentionSpec``'s docstring.

    Args:
        spec: which attention.
        query: ``[new, Hq, Dk]`` float32.
        key: ``[all, Hkv, Dk]``, of the cache's dtype, as ``value``.
        value: ``[all, Hkv, Dv]``.
        sinks: ``[Hq]`` or none.
        selected: ``[new, at least all]``, or none where all are.

    Returns:
        ``[new, Hq, Dv]``.
    """
    assert (query.shape[1], key.shape[1], key.shape[2]) == (spec.query_heads, spec.kv_heads, spec.key_dim)
    group = spec.query_heads // spec.kv_heads
    k, v = (item.float().repeat_interleave(group, 1) for item in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, k) * spec.scaling
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    seen = torch.arange(key.shape[0])[None]
    own = torch.arange(key.shape[0] - query.shape[0], key.shape[0])[:, None]
    visible = seen <= own
    if spec.window:
        visible = visible & (seen > own - spec.window)
    if spec.chunk:
        visible = visible & (seen // spec.chunk == own // spec.chunk)
    if selected is not None:
        visible = visible & selected[:, : key.shape[0]]
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks[:, None, None].expand(-1, query.shape[0], 1)
        scores = torch.cat([scores, column], -1)
    probabilities = torch.softmax(scores, -1)[..., : key.shape[0]]
    return torch.einsum("hqk,khd->qhd", probabilities, v)


def expand_latents(
    spec: AttentionSpec, latents: torch.Tensor, expand: torch.Tensor, project: torch.Tensor
) -> tuple[AttentionSpec, torch.Tensor, torch.Tensor]:
    """What cached latents stand for.

    Args:
        spec: an attention with ``heads``.
        latents: ``[all, 1, Dk]``.
        expand: ``[Hq, nope, rank]``, see `moec.artifacts.steps.LatentWeights`.
        project: ``[Hq, Dv, rank]``.

    Returns:
        The attention of their heads, keys ``[all, Hq, Dq]``, values ``[all, Hq, Dv]``.
    """
    wide = latents[:, 0].float()
    latent, shared = wide[:, : spec.value_dim], wide[:, spec.value_dim :]
    own = torch.einsum("tr,hnr->thn", latent, expand.float())
    keys = torch.cat([own, shared[:, None].expand(-1, spec.query_heads, -1)], -1)
    return spec.expanded, keys, torch.einsum("tr,hvr->thv", latent, project.float())


def select_positions(
    spec: SelectionSpec, query: torch.Tensor, weight: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """Which positions each token of a whole sequence sees, ``[T, T]``; operands as a `SelectionStep` has them."""
    result = torch.zeros(len(query), len(query), dtype=torch.bool)
    asked, weighed, keys = (each.double().numpy() for each in (query, weight, key))
    for position in range(len(query)):
        chosen = select(spec, asked[position], weighed[position], keys, position)
        result[position, : position + 1] = torch.from_numpy(chosen)
    return result
