"""Attention's arguments, checked against a table, and multi-head latent attention."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing import markers
from moec.errors import UnsupportedModelError

UNDERSTOOD = ("sliding_window", "s_aux", "softcap", "position_bias")
"""Arguments that become part of the marker."""

NO_BIAS = object()
"""A ``position_bias`` that is not ``None``, which would have T5's attention make one."""

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


UNROTATED = 16
"""Zeros in the place of the rotated part where a layer has none: the kernels of latents want one."""


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


def attend_latents(
    module: Any,
    owner: str,
    query: torch.Tensor,
    latents: tuple[torch.Tensor, torch.Tensor],
    options: dict[str, Any],
) -> torch.Tensor:
    """Cache latents, and leave to the kernel whether they are expanded, or ``kv_b_proj`` is moved into the query.

    One key ``[c, k_rope]`` serves all heads and is all that is cached; what ``kv_b_proj`` has for each head goes along
    as matrices (see `moec.artifacts.model.LatentHeads`).

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
        raise UnsupportedModelError(f"{owner} has a bias in kv_b_proj, which moec cannot absorb.")
    latent, rope_key = latents
    if rope_key.shape[-1] == 0:
        rope_key = torch.zeros_like(latent[..., :UNROTATED])
        query = torch.cat([query, torch.zeros_like(query[..., :UNROTATED])], -1)
    heads, nope, rank = query.shape[1], module.qk_nope_head_dim, module.kv_lora_rank
    weight = module.kv_b_proj.weight.view(heads, nope + module.v_head_dim, rank)
    attended: torch.Tensor = markers.attention(
        query.transpose(1, 2),
        torch.cat([latent, rope_key], -1).transpose(1, 2),
        None,
        **options,
        bias=None,
        absorb=weight[:, :nope].transpose(1, 2).contiguous(),
        expand=weight[:, :nope].contiguous(),
        project=weight[:, nope:].contiguous(),
        value_dim=rank,
    )
    return attended
