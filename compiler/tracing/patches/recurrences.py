"""The functions of transformers that advance states, as markers; several model types share each."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing import state_markers as markers

NORM_EPSILON = 1e-6
ACTIVATIONS = {"silu": torch.nn.functional.silu, "swish": torch.nn.functional.silu}


def causal_convolution(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> torch.Tensor:
    """``causal_conv1d_fn``: x ``[1, C, T]``, weight ``[C, width]``."""
    tokens_first = hidden_states.transpose(1, 2)
    out: torch.Tensor = markers.convolution(tokens_first, weight.transpose(0, 1), bias)
    return (out if activation is None else ACTIVATIONS[activation](out)).transpose(1, 2)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *_: Any,
    use_qk_l2norm_in_kernel: bool = False,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """``torch_chunk_gated_delta_rule``, and Kimi's delta attention: there each row of a state has its own decay."""
    if use_qk_l2norm_in_kernel:
        query, key = _normed(query), _normed(key)
    scaled = query * query.shape[-1] ** -0.5
    kind = "head" if g.dim() == beta.dim() else "channel"
    out: torch.Tensor = markers.recurrence(scaled, key, value, g, beta, None, kind)
    return out, None


def _normed(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPSILON)
