"""Attention's arguments, checked against a table, and multi-head latent attention in its absorbed form."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing import markers
from moec.errors import UnsupportedModelError

UNDERSTOOD = ("sliding_window", "s_aux", "softcap")
"""Arguments that become part of the marker."""

IRRELEVANT = {
    "position_ids": "positions were applied to query and key before",
    "use_cache": "the cache is outside",
    "cache_position": "the cache is outside",
    "output_router_logits": "concerns training",
    "num_items_in_batch": "concerns training",
    "layer_type": "named in the mask already",
}
"""Arguments that change nothing here, whatever their value."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0, 0.0),
    "is_causal": (None, True),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "return_dict": (None, True, False),
}
"""Arguments that change nothing as long as their value is one of these."""


def check_arguments(owner: str, arguments: dict[str, Any]) -> None:
    """Refuse what attention would silently ignore.

    Raises:
        UnsupportedModelError: an argument is unknown, or has a value that asks for something unknown.
    """
    for name, value in arguments.items():
        if value is None or name in UNDERSTOOD or name in IRRELEVANT:
            continue
        if name in NEUTRAL and any(value is item or value == item for item in NEUTRAL[name]):
            continue
        shown = type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)
        raise UnsupportedModelError(
            f"{owner} passes attention an argument that moec does not know: {name}={shown}",
            "Dropping it would change the model's results.",
            "See `moec models` for the types that compile.",
        )


def absorb_latents(
    module: Any,
    owner: str,
    query: torch.Tensor,
    latents: tuple[torch.Tensor, torch.Tensor],
    options: dict[str, Any],
) -> torch.Tensor:
    """Attend to the latents themselves, with ``kv_b_proj`` moved into the query and the output.

    With q = [q_nope, q_rope], c the latent and W_k, W_v the two parts of ``kv_b_proj``:
    ``q_nope . (W_k c) = (W_k^T q_nope) . c`` and ``sum p (W_v c) = W_v (sum p c)``, so that one key ``[c,
    k_rope]`` serves all heads and is all that is cached (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Args:
        module: of the DeepSeek kind, with ``kv_b_proj`` and its sizes.
        owner: names the model in errors.
        query: ``[1, heads, T, nope + rope]``.
        latents: c ``[1, 1, T, rank]`` and k_rope ``[1, 1, T, rope]``.
        options: the marker's other arguments.

    Returns:
        ``[1, T, heads, v_head_dim]``.
    """
    if module.kv_b_proj.bias is not None:
        raise UnsupportedModelError(f"{owner} has a bias in kv_b_proj, which moec cannot absorb")
    latent, rope_key = latents
    heads, nope, rank = query.shape[1], module.qk_nope_head_dim, module.kv_lora_rank
    weight = module.kv_b_proj.weight.view(heads, nope + module.v_head_dim, rank)
    key_weight = weight[:, :nope].transpose(1, 2).contiguous()  # [heads, rank, nope]
    value_weight = weight[:, nope:].contiguous()  # [heads, v, rank]
    query_nope, query_rope = query[0, :, :, :nope], query[0, :, :, nope:]  # [heads, T, ...]
    query_latent = markers.linear(query_nope, key_weight)  # [heads, T, rank]
    attended = markers.attention(
        torch.cat([query_latent, query_rope], -1).transpose(0, 1).unsqueeze(0),
        torch.cat([latent, rope_key], -1).transpose(1, 2),
        None,
        **options,
        value_dim=rank,
    )
    output: torch.Tensor = markers.linear(attended[0].transpose(0, 1), value_weight)  # [heads, T, v]
    return output.transpose(0, 1).unsqueeze(0)
