"""MiniMax-Text: lightning attention, and a cache class of its own."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing import state_markers as markers
from moec.compiler.tracing.patches.record import MODELS, OUTSIDE, Patch
from moec.compiler.tracing.recording import RecordingCache


def _lightning_attention(
    self: Any, hidden_states: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """The layer as the recurrence that its blocks compute."""
    mixed = self.act_fn(self.qkv_proj(hidden_states))
    mixed = mixed.view(*mixed.shape[:2], self.num_attention_heads, 3 * self.head_dim)
    query, key, value = torch.split(mixed, self.head_dim, 3)
    slope = self.slope_rate.view(self.num_attention_heads)
    out: torch.Tensor = markers.recurrence(query, key, value, None, None, -slope, "fixed")
    normed = self.norm(out.flatten(2))
    return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * normed), None


_MODULE = f"{MODELS}.minimax.modeling_minimax"

PATCHES = (
    Patch(_MODULE, "MiniMaxLightningAttention.forward", _lightning_attention, OUTSIDE),
    Patch(_MODULE, "MiniMaxCache", RecordingCache, "it takes no other cache"),
)
