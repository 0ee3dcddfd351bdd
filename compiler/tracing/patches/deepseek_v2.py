"""DeepSeek-V2: rotation in real arithmetic."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing.patches.record import MODELS, Patch


def _rotation_table(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Cosine and sine side by side ``[1, T, D/2, 2]``, instead of one complex number."""
    angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
    table: torch.Tensor = torch.stack([angles.cos(), angles.sin()], -1) * self.attention_scaling
    return table


def _rotate_pairs(
    xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate pairs of neighbours of ``[1, heads, T, D]`` in real arithmetic."""
    cos, sin = freqs_cis[..., 0].unsqueeze(1), freqs_cis[..., 1].unsqueeze(1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = x.float().reshape(*x.shape[:-1], -1, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return turned.flatten(-2).type_as(x)

    return rotate(xq), rotate(xk)


PATCHES = (
    Patch(
        f"{MODELS}.deepseek_v2.modeling_deepseek_v2",
        "DeepseekV2RotaryEmbedding.forward",
        _rotation_table,
        "complex numbers have no kernels",
    ),
    Patch(
        f"{MODELS}.deepseek_v2.modeling_deepseek_v2",
        "apply_rotary_emb",
        _rotate_pairs,
        "complex numbers have no kernels",
    ),
)
