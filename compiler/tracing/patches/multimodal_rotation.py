"""Qwen3-VL, Qwen3-Omni and Qwen3.5: rotation by three rows of positions, which are equal where all is text."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing.patches.record import MODELS, Patch


def _one_row(_: Any, table: torch.Tensor) -> torch.Tensor:
    """``[3, 1, T, D/2]`` of equal rows to ``[1, T, D]``."""
    return torch.cat((table[0], table[0]), dim=-1)


PATCHES = tuple(
    Patch(
        f"{MODELS}.{family}.modeling_{family}",
        f"{rotation}.recomposition_frequencies",
        _one_row,
        "it writes rows of other positions into a tensor",
    )
    for family, rotation in (
        ("qwen3_5_moe", "Qwen3_5MoeTextRotaryEmbedding"),
        ("qwen3_vl_moe", "Qwen3VLMoeTextRotaryEmbedding"),
        ("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextRotaryEmbedding"),
    )
)
