"""``llama``: with experts, Mixtral."""

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
    routed_experts,
)
from moec.compiler.checkpoint.gguf.architectures.record import GgufArchitecture, place

if TYPE_CHECKING:
    from moec.compiler.checkpoint.gguf.architectures.record import Tensors
    from moec.compiler.checkpoint.gguf.metadata import Metadata


def _config(metadata: Metadata, _: Tensors) -> dict[str, Any]:
    routed = routed_experts(metadata)
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        **decoder_config(metadata),
        "num_key_value_heads": key_value_heads(metadata),
        "head_dim": head_size(metadata),
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_local_experts": routed,
        "sliding_window": None,
        "rope_parameters": rotary(metadata),
    }


_EXPERT = LAYER + "block_sparse_moe.experts.{expert}."

LLAMA = GgufArchitecture(
    _config,
    {
        **TRUNK,
        **attention(rotated=True),
        **experts("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}", "w1", "w3", "w2"),
        # Files from before April 2024 have a tensor an expert.
        "blk.{layer}.ffn_gate.{expert}.weight": place(_EXPERT + "w1.weight"),
        "blk.{layer}.ffn_up.{expert}.weight": place(_EXPERT + "w3.weight"),
        "blk.{layer}.ffn_down.{expert}.weight": place(_EXPERT + "w2.weight"),
    },
)
