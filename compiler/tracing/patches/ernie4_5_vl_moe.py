"""Ernie 4.5 VL: tokens of text go to the experts for text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.compiler.tracing.patches.record import MODELS, Patch

if TYPE_CHECKING:
    import torch


def _text_experts(
    self: Any, hidden_states: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers' for text, which flattens all tokens in between."""
    block = self.text_moe
    tokens = hidden_states.view(-1, block.hidden_dim)
    logits, weights, index = block.gate(tokens)
    output = block.experts(tokens, index, weights).view(hidden_states.shape)
    if self.shared_experts is not None:
        output = output + self.shared_experts(hidden_states)
    return output, logits


PATCHES = (
    Patch(
        f"{MODELS}.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe",
        "Ernie4_5_VLMoeMoeBlock.forward",
        _text_experts,
        "it flattens the tokens of a call",
    ),
)
