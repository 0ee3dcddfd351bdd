"""NLLB-MoE: routing as published, and positions from outside.

In transformers 5.23 ``NllbMoeExperts.forward`` takes the router's one-hot mask for expert numbers and encodes it
once more: of all experts only 0 and 1 run. What stands here is what transformers 4 computed and the model was trained
with (fairseq's top-2 gate): the two likeliest experts with weights that sum to 1.
"""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing import markers
from moec.compiler.tracing.patches.record import MODELS, Patch
from moec.compiler.tracing.positions import positions_of
from moec.errors import UnsupportedModelError

MODULE = f"{MODELS}.nllb_moe.modeling_nllb_moe"


def _route(self: Any, hidden_states: torch.Tensor, padding_mask: Any = None) -> torch.Tensor:
    """The sparse layer: top-2 in float32, each result times what ``moe_token_dropout`` leaves of it.

    An expert has room for ``moe_eval_capacity_token_fraction`` of the tokens: at 1 nothing is ever dropped, since a
    token chooses an expert once. Weights are made to sum to 1 before tokens are dropped, or again after.
    """
    del padding_mask
    router, flat = self.router, hidden_states.reshape(-1, hidden_states.shape[-1])
    _check_routing(router)
    weight, index = torch.topk(torch.softmax(router.classifier(flat), dim=-1), 2, dim=-1)
    if router.normalize_router_prob_before_dropping or not _drops(router):
        weight = _normalized(weight)
    if _drops(router):
        share = float(router.moe_eval_capacity_token_fraction)
        tokens = 0 if share > 0 else int(router.expert_capacity)
        weight = markers.capacity(index, weight, tokens, max(share, 0.0))
        if not router.normalize_router_prob_before_dropping:
            weight = _normalized(weight)
    dropout = float(self.experts.moe_token_dropout)
    routed: torch.Tensor = self.experts(flat, index, weight * (1 - dropout))
    return routed.reshape(hidden_states.shape)


def _drops(router: Any) -> bool:
    return float(router.moe_eval_capacity_token_fraction) < 1


def _normalized(weight: torch.Tensor) -> torch.Tensor:
    return weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)


def _check_routing(router: Any) -> None:
    if router.second_expert_policy != "all":
        raise UnsupportedModelError(
            f"This NLLB-MoE routes with second_expert_policy={router.second_expert_policy!r}",
            "moec runs the published setting, 'all', with which nothing is drawn.",
        )
    if router.batch_prioritized_routing and _drops(router):
        raise UnsupportedModelError(
            "This NLLB-MoE drops the tokens whose router is least sure (batch_prioritized_routing)",
            "moec drops the last tokens, as published, or none (moe_eval_capacity_token_fraction=1).",
        )


def _positions(self: Any, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Rows of the sinusoidal table; the first token's is that after the padding's."""
    return torch.nn.functional.embedding(positions_of(input_ids) + (self.padding_idx + 1), self.weights)


PATCHES = (
    Patch(MODULE, "NllbMoeSparseMLP.forward", _route, "transformers runs experts 0 and 1 only"),
    Patch(
        MODULE,
        "NllbMoeSinusoidalPositionalEmbedding.forward",
        _positions,
        "it counts the tokens of a call",
    ),
)
