"""What kernels compute, in torch and float64, at sizes where numpy would take minutes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels.packed import dequantize_rows
from moec.artifacts.layout.experts import layout
from moec.compiler.activation import activate
from moec.formats import FORMATS

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec, ExpertBody


def expert_parts(body: ExpertBody, data: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of one expert, in float64; ``data`` is its ``[stride]`` bytes."""
    parts = {}
    for part in layout(body).parts:
        raw = data[part.offset_bytes : part.offset_bytes + part.size_bytes]
        if body.format is not None and len(part.shape) == 2:
            columns = body.intermediate if part.name == "down" else body.hidden
            parts[part.name] = dequantize_rows(FORMATS[body.format], raw.reshape(part.shape), columns)
            continue
        parts[part.name] = raw.view(getattr(torch, body.dtype)).reshape(part.shape).double()
    return parts


def experts(
    body: ExpertBody, memory: torch.Tensor, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """``out [T, H]``; ``memory`` is ``[E, stride]`` bytes, ``x [T, H]``, ``index [T, K]``, ``weight [T, K]``."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for expert in sorted(set(index.flatten().tolist())):
        token, place = (index == expert).nonzero(as_tuple=True)
        parts = expert_parts(body, memory[expert])
        rows = x[token].double()
        names = ("gate", "up") if body.gated else ("up",)
        variables = {name: rows @ parts[name].T + parts.get(f"{name}_bias", 0.0) for name in names}
        product = activate(body.activation, variables) @ parts["down"].T + parts.get("down_bias", 0.0)
        out.index_add_(0, token, weight[token, place].double()[:, None] * product)
    return out


def expand_latents(
    spec: AttentionSpec, latents: torch.Tensor, own: torch.Tensor, value: torch.Tensor
) -> tuple[AttentionSpec, torch.Tensor, torch.Tensor]:
    """What latents ``[C, 1, Dk]`` stand for: the attention of their heads, keys and values, in float64."""
    latent, shared = latents[:, 0, : spec.value_dim].double(), latents[:, 0, spec.value_dim :].double()
    keys = torch.einsum("cr,hnr->chn", latent, own.double())
    spread = shared[:, None].expand(-1, spec.query_heads, -1)
    values = torch.einsum("cr,hvr->chv", latent, value.double())
    return spec.expanded, torch.cat([keys, spread], -1), values


def attention(
    spec: AttentionSpec,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    sinks: torch.Tensor | None,
    selected: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out [T, Hq, Dv]`` of one sequence.

    Args:
        spec: which positions a token sees, and how scores are made.
        query: ``[T, Hq, Dk]``.
        keys: ``[C, Hkv, Dk]``, as cached, from position 0.
        values: ``[C, Hkv, Dv]``.
        position: ``[T]``.
        sinks: ``[Hq]`` or ``None``.
        selected: ``[T, C]``, where only some positions are seen.
    """
    group = spec.query_heads // spec.kv_heads
    place, seen_from = torch.arange(keys.shape[0], device=keys.device), position[:, None]
    hidden = place > seen_from
    if spec.window:
        hidden |= place <= seen_from - spec.window
    if spec.chunk:
        hidden |= place < seen_from // spec.chunk * spec.chunk
    if selected is not None:
        hidden |= ~selected
    heads = []
    for head in range(spec.query_heads):
        scores = spec.scaling * (query[:, head].double() @ keys[:, head // group].double().T)
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        scores.masked_fill_(hidden, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].double().expand(scores.shape[0], 1)], 1)
        weights = torch.softmax(scores, -1)[:, : keys.shape[0]]
        heads.append(weights @ values[:, head // group].double())
    return torch.stack(heads, 1)
