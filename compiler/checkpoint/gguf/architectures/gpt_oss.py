"""``gpt-oss``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.compiler.checkpoint.gguf.architectures.common import (
    LAYER,
    TRUNK,
    attention,
    decoder_config,
    head_size,
    key_value_heads,
    rotary,
)
from moec.compiler.checkpoint.gguf.architectures.record import GgufArchitecture, place

if TYPE_CHECKING:
    from moec.compiler.checkpoint.gguf.architectures.record import Tensors
    from moec.compiler.checkpoint.gguf.metadata import Metadata


def _config(metadata: Metadata, _: Tensors) -> dict[str, Any]:
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        **decoder_config(metadata),
        "num_key_value_heads": key_value_heads(metadata),
        "head_dim": head_size(metadata),
        "intermediate_size": metadata.integer("expert_feed_forward_length"),
        "num_local_experts": metadata.integer("expert_count"),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "rope_parameters": rotary(metadata, truncate=False),
    }


BIASED = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate_inp": "mlp.router",
}
"""GGUF's products with a bias -> the checkpoint's, in a layer."""


GPT_OSS = GgufArchitecture(
    _config,
    {
        **TRUNK,
        **attention(),
        **{f"blk.{{layer}}.{own}.bias": place(f"{LAYER}{name}.bias") for own, name in BIASED.items()},
        "blk.{layer}.post_attention_norm.weight": place(LAYER + "post_attention_layernorm.weight"),
        "blk.{layer}.attn_sinks.weight": place(LAYER + "self_attn.sinks"),
        "blk.{layer}.ffn_gate_inp.weight": place(LAYER + "mlp.router.weight"),
        # All experts in one tensor there too, but gate and up apart, and rows of outputs.
        "blk.{layer}.ffn_gate_exps.weight": place(LAYER + "mlp.experts.gate_proj"),
        "blk.{layer}.ffn_up_exps.weight": place(LAYER + "mlp.experts.up_proj"),
        "blk.{layer}.ffn_down_exps.weight": place(LAYER + "mlp.experts.down_proj"),
        "blk.{layer}.ffn_gate_exps.bias": place(LAYER + "mlp.experts.gate_proj_bias"),
        "blk.{layer}.ffn_up_exps.bias": place(LAYER + "mlp.experts.up_proj_bias"),
        "blk.{layer}.ffn_down_exps.bias": place(LAYER + "mlp.experts.down_proj_bias"),
    },
)
