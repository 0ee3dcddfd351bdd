"""Qwen3.5: rotation by positions in a text, which are the same in time, height and width."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing.patches.record import MODELS, Patch


def _rotation(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables ``[1, T, D]`` of three equal positions: which of them a frequency takes does not matter."""
    angles = position_ids[0][..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
    table = torch.cat((angles, angles), dim=-1)
    cos, sin = table.cos() * self.attention_scaling, table.sin() * self.attention_scaling
    return cos.to(x.dtype), sin.to(x.dtype)


PATCHES = (
    Patch(
        f"{MODELS}.qwen3_5_moe.modeling_qwen3_5_moe",
        "Qwen3_5MoeTextRotaryEmbedding.forward",
        _rotation,
        "it takes three positions a token, and writes into its tables",
    ),
)
