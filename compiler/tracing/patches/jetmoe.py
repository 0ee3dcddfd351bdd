"""JetMoE: experts of one matrix around attention, as products with all of them and a choice.

Its attention has experts too: each token chooses K of E projections for its queries, and with the same choice for what
comes out. All E are computed and all but K thrown away, which is right, and costs E / K times as much as is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from moec.compiler.tracing.interface import run_attention
from moec.compiler.tracing.patches.record import MODELS, Patch

MODULE = f"{MODELS}.jetmoe.modeling_jetmoe"


def _choose(router: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts ``[..., K]`` of tokens ``[..., H]``."""
    best, index = router.layer(tokens).float().topk(router.top_k, dim=-1)
    return torch.softmax(best, dim=-1), index


def _block(self: Any, layer_input: torch.Tensor) -> torch.Tensor:
    """The experts behind attention, which are of the usual kind."""
    tokens = layer_input.reshape(-1, self.input_size)
    weight, index = _choose(self.router, tokens)
    output: torch.Tensor = self.experts(tokens, index, weight).view(layer_input.shape) + self.bias
    return output


def _attention(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: Any = None,
    position_embeddings: Any = None,
    past_key_values: Any = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None, None]:
    """Query head ``h * K + k`` is head h of the k-th chosen expert: then neighbours share a key, as kernels want it."""
    experts, heads, size = self.experts, self.num_key_value_heads, self.head_dim
    count, width = experts.num_experts, experts.hidden_size
    rows = hidden_states.shape[:2]
    weight, index = _choose(experts.router, hidden_states)
    chosen = (index[..., None] == torch.arange(count)).float()  # [1, T, K, E]
    projected = functional.linear(hidden_states, experts.input_linear.weight.flatten(0, 1))
    queries = (chosen[..., None] * projected.view(*rows, 1, count, width)).sum(-2)  # [1, T, K, D]
    query = queries.view(*rows, self.top_k, heads, size).permute(0, 3, 2, 1, 4).flatten(1, 2)
    key, value = (
        part.view(*rows, heads, size).transpose(1, 2) for part in self.kv_proj(hidden_states).chunk(2, dim=-1)
    )
    query, key = _rotate(query, *position_embeddings), _rotate(key, *position_embeddings)
    key, value = past_key_values.update(key, value, self.layer_idx)
    attended = run_attention(self, query, key, value, attention_mask, scaling=self.scaling, **arguments)
    parts = attended.view(*rows, heads, self.top_k, size).transpose(2, 3).reshape(*rows, self.top_k, 1, width)
    spread = (parts * (chosen * weight[..., None])[..., None]).sum(2)  # [1, T, E, D]
    back = experts.output_linear.weight.permute(1, 0, 2).flatten(1, 2)
    return functional.linear(spread.flatten(2), back) + experts.bias, None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


PATCHES = (
    Patch(MODULE, "JetMoeMoE.forward", _block, "it sorts the tokens of a call by their experts"),
    Patch(MODULE, "JetMoeAttention.forward", _attention, "it sorts the tokens of a call by their experts"),
)
