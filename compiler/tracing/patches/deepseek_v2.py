"""DeepSeek-V2: rotation in real arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.tracing.patches.record import MODELS, Patch
from moec.compiler.tracing.patches.rotation import WHY, rotate_pairs, rotation_table

if TYPE_CHECKING:
    import torch

MODULE = f"{MODELS}.deepseek_v2.modeling_deepseek_v2"


def _rotate(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys are ``[1, heads, T, D]``."""
    return rotate_pairs(xq, freqs_cis, 1), rotate_pairs(xk, freqs_cis, 1)


PATCHES = (
    Patch(MODULE, "DeepseekV2RotaryEmbedding.forward", rotation_table, WHY),
    Patch(MODULE, "apply_rotary_emb", _rotate, WHY),
)
