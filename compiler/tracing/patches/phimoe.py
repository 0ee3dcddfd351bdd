"""Phi-3.5-MoE: rotary tables of two scales."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing.patches.record import MODELS, Patch


def _phimoe_rotation(
    self: Any, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phi-3.5-MoE's tables, each token with the scale that its own position asks for.

    transformers takes the largest position of a call for all its tokens; the two agree in every decode step,
    and for every prompt within the original context.
    """
    angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
    table = torch.cat((angles, angles), dim=-1)
    scale: Any = self.attention_scaling
    parameters = self.config.rope_parameters
    if parameters["rope_type"] != "default":
        beyond = (position_ids >= parameters["original_max_position_embeddings"])[..., None].float()
        short, long = float(parameters["short_mscale"]), float(parameters["long_mscale"])
        scale = short if short == long else short + beyond * (long - short)
    return (table.cos() * scale).to(x.dtype), (table.sin() * scale).to(x.dtype)


PATCHES = (
    Patch(
        f"{MODELS}.phimoe.modeling_phimoe",
        "PhimoeRotaryEmbedding.forward",
        _phimoe_rotation,
        "it chooses a scale by the largest position of the call",
    ),
)
