"""Phi-3.5-MoE: a rotary table whose scale is settled beside its frequencies."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing.patches.record import MODELS, Patch


def _rotation(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The table, by frequencies and scale as they were settled (see ``tracing.rope``)."""
    angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
    table = torch.cat((angles, angles), dim=-1)
    scale = self.attention_scaling
    return (table.cos() * scale).to(x.dtype), (table.sin() * scale).to(x.dtype)


PATCHES = (
    Patch(
        f"{MODELS}.phimoe.modeling_phimoe",
        "PhimoeRotaryEmbedding.forward",
        _rotation,
        "it chooses a scale by the largest position of the call, and never the frequencies that belong to it",
    ),
)
