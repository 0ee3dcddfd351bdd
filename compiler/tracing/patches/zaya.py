"""ZAYA1: compressed convolutional attention (arXiv 2510.04476), with everything delayed by markers."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing import state_markers as markers
from moec.compiler.tracing.markers import linear
from moec.compiler.tracing.patches.record import MODELS, OUTSIDE, Patch


def _projection(
    self: Any, hidden_states: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values ``[1, T, heads, head_dim]``."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
    mixed = _convolutions(self, torch.cat([query, key], -1)).view(shape)
    query, key = query.view(shape), key.view(shape)
    groups = (*key.shape[:3], self.num_key_value_groups, self.head_dim)
    mean = (query + key.unsqueeze(3).expand(groups).reshape(query.shape)) * 0.5
    heads = self.num_attention_heads
    return (
        mixed[:, :, :heads] + mean,
        mixed[:, :, heads:] + mean.view(groups).mean(-2),
        torch.cat([self.v_proj_current(hidden_states), _delayed_value(self, hidden_states)], -1).view(shape),
    )


def _convolutions(self: Any, x: torch.Tensor) -> torch.Tensor:
    """A convolution of each channel, then one within each head, which sees results of the first as products see them.

    What is before a sequence is 0 for the first, so that the second sees its bias there.
    """
    first, second, count = self.conv_qk_depthwise, self.conv_qk_grouped, self.grouped_kernel_size
    taps, size = first.weight.squeeze(1).transpose(0, 1), self.head_dim
    # For each tap of the second, the oldest first, what it sees: the first convolution, delayed.
    delayed = [torch.nn.functional.pad(taps, (0, 0, tap, count - 1 - tap)) for tap in range(count)]
    heads = (*x.shape[:2], -1, size)
    seen = torch.cat([markers.convolution(x, each, first.bias).view(heads) for each in delayed], -1)
    weight = second.weight.view(-1, size, size, count).permute(0, 1, 3, 2).reshape(-1, size, count * size)
    out = linear(seen.squeeze(0).transpose(0, 1), weight, second.bias.view(-1, 1, size))
    joined: torch.Tensor = out.transpose(0, 1).unsqueeze(0).flatten(2)
    return joined


def _delayed_value(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The projection of the token before, which is that of 0 for the first."""
    projection = self.v_proj_delayed
    taps = torch.tensor([[1.0], [0.0]]).expand(2, projection.out_features)
    product = torch.nn.functional.linear(hidden_states, projection.weight)
    shifted: torch.Tensor = markers.convolution(product, taps, projection.bias)
    return shifted


def _unit_norm(
    self: Any, query_states: torch.Tensor, key_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of length ``sqrt(head_dim)``, the latter scaled for each head."""

    def normed(x: torch.Tensor) -> torch.Tensor:
        length = torch.sqrt((x * x).sum(-1, keepdim=True)).clamp_min(torch.finfo(x.dtype).eps)
        scaled: torch.Tensor = x * (self.head_dim_scale / length)
        return scaled

    return normed(query_states), normed(key_states) * self.temp[:, None]


_MODULE = f"{MODELS}.zaya.modeling_zaya"

PATCHES = (
    Patch(_MODULE, "ZayaCCAProjection.forward", _projection, OUTSIDE),
    Patch(_MODULE, "ZayaQKNorm.forward", _unit_norm, "norms of vectors have no loops"),
)
