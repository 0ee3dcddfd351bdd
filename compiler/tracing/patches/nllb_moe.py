"""NLLB-MoE: routing as published, and positions from outside.

In transformers 5.23 ``NllbMoeExperts.forward`` takes the router's one-hot mask for expert numbers and encodes it
once more: of all experts only 0 and 1 run. What stands here is what transformers 4 computed and the model was trained
with (fairseq's top-2 gate): the two likeliest experts with weights that sum to 1.
"""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing.patches.record import MODELS, Patch
from moec.compiler.tracing.positions import positions_of
from moec.errors import UnsupportedModelError

MODULE = f"{MODELS}.nllb_moe.modeling_nllb_moe"


def _route(self: Any, hidden_states: torch.Tensor, padding_mask: Any = None) -> torch.Tensor:
    """The sparse layer: top-2 in float32, each result times what ``moe_token_dropout`` leaves of it.

    An expert has room for ``moe_eval_capacity_token_fraction`` of the tokens: at 1 nothing is ever dropped.
    """
    del padding_mask
    router, flat = self.router, hidden_states.reshape(-1, hidden_states.shape[-1])
    _check_routing(router)
    weight, index = torch.topk(torch.softmax(router.classifier(flat), dim=-1), 2, dim=-1)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
    dropout = float(self.experts.moe_token_dropout)
    routed: torch.Tensor = self.experts(flat, index, weight * (1 - dropout))
    return routed.reshape(hidden_states.shape)


def _check_routing(router: Any) -> None:
    fraction = float(router.moe_eval_capacity_token_fraction)
    if router.second_expert_policy != "all" or fraction < 1:
        raise UnsupportedModelError(
            f"This NLLB-MoE routes with second_expert_policy={router.second_expert_policy!r} and "
            f"moe_eval_capacity_token_fraction={fraction}",
            "moec runs the published settings, 'all' and 1.0, with which no token is dropped and nothing is drawn.",
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
