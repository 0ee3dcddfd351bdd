"""What is put in the model's way while it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import DeepseekV2ForCausalLM


class Router:
    """Hears what every gate decides in a forward pass."""

    def __init__(self, model: DeepseekV2ForCausalLM) -> None:
        self.heard: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(self._hear)

    def _hear(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.heard.append((output[0], output[2]))

    def take(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The logits and choices of every layer since the last call."""
        heard, self.heard = self.heard, []
        return heard


def balance_loss(heard: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Experts times the sum of (share of choices x mean probability), meaned over layers; 1 is even."""
    losses = []
    for logits, choices in heard:
        experts = logits.shape[-1]
        share = torch.bincount(choices.reshape(-1), minlength=experts) / choices.numel()
        losses.append(experts * (share * logits.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


class Dropout:
    """Dropout on the embeddings and on what each branch adds to the residual stream.

    The masks are cut at random places out of one long one, which costs far less than new ones.
    """

    def __init__(self, rate: float) -> None:
        drawn = torch.rand(2**23, generator=torch.Generator().manual_seed(0)) >= rate
        self.mask = (drawn / (1 - rate)).to(torch.bfloat16)

    def __call__(self, module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        """Drops, as a forward hook does."""
        if not module.training:
            return output
        start = int(torch.randint(self.mask.numel() - output.numel(), (1,))) // 32 * 32
        return output * self.mask[start : start + output.numel()].view_as(output)

    def attach(self, model: DeepseekV2ForCausalLM) -> None:
        """Hooks it into the model."""
        model.model.embed_tokens.register_forward_hook(self)
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(self)
            layer.mlp.register_forward_hook(self)
