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
) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch_chunk_gated_delta_rule``, and Kimi's delta attention: there each row of a state has its own decay.

    Returns:
        The result, and instead of a state once more the result: callers hand it to the cache, which keeps nothing.
    """
    if use_qk_l2norm_in_kernel:
        query, key = _normed(query), _normed(key)
    scaled = query * query.shape[-1] ** -0.5
    kind = "head" if g.dim() == beta.dim() else "channel"
    out: torch.Tensor = markers.recurrence(scaled, key, value, g, beta, None, kind)
    return out, out


def _normed(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPSILON)


def chunk_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *_: Any,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **__: Any,
) -> torch.Tensor | tuple[torch.Tensor, None]:
    """``mamba2_chunk_scan``: x ``[1, T, heads, head_dim]``, dt ``[1, T, heads]``, B and C ``[1, T, groups, state]``."""
    step = dt if dt_bias is None else dt + dt_bias
    if dt_softplus:
        step = torch.nn.functional.softplus(step)
    low, high = dt_limit
    if low > 0:
        step = step.clamp_min(low)
    if high < float("inf"):
        step = step.clamp_max(high)
    value = hidden_states * step[..., None]
    out: torch.Tensor = markers.recurrence(C, B, value, step * A, None, None, "head")
    out = out if D is None else out + D[:, None] * hidden_states
    return (out, None) if return_final_states else out
