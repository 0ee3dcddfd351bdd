"""Llama 4: rotation in real arithmetic, positions from outside, weights on what goes into experts."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing.interface import run_attention, run_experts
from moec.compiler.tracing.patches.record import MODELS, Patch
from moec.compiler.tracing.patches.rotation import WHY, rotate_pairs, rotation_table
from moec.errors import UnsupportedModelError

MODULE = f"{MODELS}.llama4.modeling_llama4"


def _rotate(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys are ``[1, T, heads, D]``."""
    return rotate_pairs(xq, freqs_cis, 2), rotate_pairs(xk, freqs_cis, 2)


def _decoder_layer(self: Any, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """As transformers', but attention gets the positions."""
    attended, _ = self.self_attn(self.input_layernorm(hidden_states), **arguments)
    hidden_states = hidden_states + attended
    fed = self.feed_forward(self.post_attention_layernorm(hidden_states))
    output: torch.Tensor = fed[0] if self.is_moe_layer else fed
    return hidden_states + output.view(hidden_states.shape)


def _attention(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor,
    past_key_values: Any = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers', but the temperature of a query follows from its position, not from its place in the call."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
    value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
    if self.use_rope:
        query, key = _rotate(query, key, position_embeddings)
    if hasattr(self, "qk_norm"):
        query, key = self.qk_norm(query), self.qk_norm(key)
    if self.attn_temperature_tuning and not self.use_rope:
        stretches = torch.floor((position_ids.float() + 1.0) / self.floor_scale)
        query = query * (torch.log1p(stretches) * self.attn_scale + 1.0)[..., None, None]
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    key, value = past_key_values.update(key, value, self.layer_idx)
    attended = run_attention(self, query, key, value, attention_mask, scaling=self.scaling, **arguments)
    return self.o_proj(attended.flatten(2)), None


def _experts(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen expert sees its weight times the token, instead of every expert all tokens, most of them times 0."""
    if self.top_k != 1:
        raise UnsupportedModelError(
            f"{type(self).__name__} chooses {self.top_k} experts a token.",
            "It weighs what goes into them, moec's kernels weigh what comes out: with one expert that can be changed.",
        )
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    logits = torch.nn.functional.linear(hidden_states, self.router.weight)
    best, index = torch.topk(logits, 1, dim=1)
    weighted = hidden_states * torch.sigmoid(best)
    routed = run_experts(self.experts, weighted, index, torch.ones_like(best))
    return self.shared_expert(hidden_states) + routed, logits


PATCHES = (
    Patch(MODULE, "Llama4TextRotaryEmbedding.forward", rotation_table, WHY),
    Patch(MODULE, "Llama4TextDecoderLayer.forward", _decoder_layer, "it keeps the positions from attention"),
    Patch(MODULE, "Llama4TextAttention.forward", _attention, "it counts the tokens of a call"),
    Patch(MODULE, "Llama4TextMoe.forward", _experts, "its experts are not on the experts interface"),
)
