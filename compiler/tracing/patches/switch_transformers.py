"""Switch Transformers: masks and biases as descriptions, routing whose capacity is a step of its own."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing import markers
from moec.compiler.tracing.attention import NO_BIAS
from moec.compiler.tracing.masks import MaskSpec
from moec.compiler.tracing.model.distances import BUCKETS
from moec.compiler.tracing.patches.record import MODELS, Patch

MODULE = f"{MODELS}.switch_transformers.modeling_switch_transformers"


def _self_attention(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: Any = None,
    position_bias: torch.Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """The layer, with a description where the encoder makes a mask of its own."""
    attended, bias, _ = self.SelfAttention(
        self.layer_norm(hidden_states),
        mask=attention_mask if self.SelfAttention.is_decoder else MaskSpec(causal=False),
        position_bias=position_bias,
        past_key_values=past_key_values,
        **options,
    )
    return hidden_states + attended, bias, None


def _cross_attention(
    self: Any,
    hidden_states: torch.Tensor,
    key_value_states: torch.Tensor,
    attention_mask: Any = None,
    position_bias: Any = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, None, None]:
    """The layer without its bias, a tensor of zeros between the tokens of two sequences."""
    del position_bias
    attended, _, _ = self.EncDecAttention(
        self.layer_norm(hidden_states),
        mask=attention_mask,
        key_value_states=key_value_states,
        position_bias=NO_BIAS,
        past_key_values=past_key_values,
        **options,
    )
    return hidden_states + attended, None, None


def _bias_by_distance(self: Any, *_: Any, **__: Any) -> torch.Tensor:
    """The bias of each distance within reach ``[heads, 2 * reach + 1]``, instead of one for each pair of tokens."""
    weight, buckets = self.relative_attention_bias.weight, getattr(self, BUCKETS)
    table: torch.Tensor = torch.index_select(weight.t(), 1, buckets)
    return table


def _route(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The sparse layer: the likeliest expert of each token, as long as it has capacity left."""
    router, flat = self.router, hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = router.classifier(flat)
    weight, index = torch.topk(torch.softmax(logits, dim=-1), 1, dim=-1)
    kept = markers.capacity(index, weight, int(router.expert_capacity), 0.0)
    routed: torch.Tensor = self.experts(flat, index, kept)
    return routed.reshape(hidden_states.shape)


PATCHES = (
    Patch(MODULE, "SwitchTransformersLayerSelfAttention.forward", _self_attention, "it makes a mask tensor"),
    Patch(
        MODULE,
        "SwitchTransformersLayerCrossAttention.forward",
        _cross_attention,
        "its bias pairs the tokens of two sequences",
    ),
    Patch(
        MODULE, "SwitchTransformersAttention.compute_bias", _bias_by_distance, "it pairs tokens with tokens"
    ),
    Patch(
        MODULE,
        "SwitchTransformersSparseMLP.forward",
        _route,
        "it counts tokens along the sequence, and its experts do not go through the experts interface",
    ),
)
