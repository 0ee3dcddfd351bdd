"""Rotation of neighbouring pairs in real arithmetic, where transformers multiplies complex numbers."""

from __future__ import annotations

from typing import Any

import torch

WHY = "complex numbers have no kernels"


def rotation_table(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Cosine and sine side by side ``[1, T, D/2, 2]``, instead of one complex number."""
    angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
    table: torch.Tensor = torch.stack([angles.cos(), angles.sin()], -1) * self.attention_scaling
    return table


def rotate_pairs(x: torch.Tensor, table: torch.Tensor, heads_axis: int) -> torch.Tensor:
    """Rotate pairs of neighbours of ``x``, whose axis of heads the table has not."""
    cos, sin = table[..., 0].unsqueeze(heads_axis), table[..., 1].unsqueeze(heads_axis)
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.flatten(-2).type_as(x)
