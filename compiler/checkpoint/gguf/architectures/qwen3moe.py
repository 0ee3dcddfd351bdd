"""``qwen3moe``: Qwen3-MoE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.compiler.checkpoint.gguf.architectures.common import (
    LAYER,
    TRUNK,
    attention,
    decoder_config,
    experts,
    head_size,
    key_value_heads,
    rotary,
)
from moec.compiler.checkpoint.gguf.architectures.record import GgufArchitecture, place

if TYPE_CHECKING:
    from moec.compiler.checkpoint.gguf.architectures.record import Tensors
    from moec.compiler.checkpoint.gguf.metadata import Metadata


def _config(metadata: Metadata, _: Tensors) -> dict[str, Any]:
    width = metadata.integer("expert_feed_forward_length")
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        **decoder_config(metadata),
        "num_key_value_heads": key_value_heads(metadata),
        "head_dim": head_size(metadata),
        "intermediate_size": metadata.integer("feed_forward_length", width),
        "moe_intermediate_size": width,
        "num_experts": metadata.integer("expert_count"),
        "norm_topk_prob": True,  # GGUF has no key for it: llama.cpp does it for every qwen3moe
        "sliding_window": None,
        "rope_parameters": rotary(metadata),
    }


QWEN3MOE = GgufArchitecture(
    _config,
    {
        **TRUNK,
        **attention(),
        "blk.{layer}.attn_q_norm.weight": place(LAYER + "self_attn.q_norm.weight"),
        "blk.{layer}.attn_k_norm.weight": place(LAYER + "self_attn.k_norm.weight"),
        **experts("mlp.gate", "mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj"),
    },
)
