"""DBRX: the norm of a token's expert weights as a sum."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing.patches.record import MODELS, Patch


def _route(self: Any, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers', for any p."""
    chances = torch.nn.functional.softmax(router_logits, dim=1, dtype=router_logits.dtype)
    weight, index = torch.topk(chances, self.top_k, dim=-1)
    power = self.moe_normalize_expert_weights
    if power is not None:
        weight = weight / weight.pow(power).sum(-1, keepdim=True).pow(1.0 / power)
    return weight, index


PATCHES = (
    Patch(
        f"{MODELS}.dbrx.modeling_dbrx",
        "DbrxFFN.route_tokens_to_experts",
        _route,
        "norms have no kernels",
    ),
)
