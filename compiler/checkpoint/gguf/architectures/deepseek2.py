"""``deepseek2``: DeepSeek-V2, and with sigmoid scores DeepSeek-V3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.compiler.checkpoint.gguf.architectures.common import (
    LAYER,
    TRUNK,
    decoder_config,
    experts,
    rotary,
    routed_experts,
)
from moec.compiler.checkpoint.gguf.architectures.record import GgufArchitecture, place
from moec.errors import UnsupportedModelError

if TYPE_CHECKING:
    from moec.compiler.checkpoint.gguf.architectures.record import Tensors
    from moec.compiler.checkpoint.gguf.metadata import Metadata

SOFTMAX, SIGMOID = 1, 2
"""Values of ``expert_gating_func``."""
LOG_MULTIPLIER = 0.1
"""Of YaRN's ``mscale_all_dim`` in ``yarn_log_multiplier``."""
GROUPED = (160, 256)
"""Routed experts of DeepSeek-V2 and V3, whose routers first choose groups of experts."""


def _config(metadata: Metadata, tensors: Tensors) -> dict[str, Any]:
    routed = routed_experts(metadata)
    biased = any(name.endswith("exp_probs_b.bias") for name in tensors)
    scores = metadata.integer("expert_gating_func", SIGMOID if biased else SOFTMAX)
    heads, groups = metadata.integer("attention.head_count"), metadata.integer("expert_group_count", 1)
    # Files for attention on latents say the latents' lengths first, those of heads under other keys.
    length = metadata.integer("attention.key_length_mla", metadata.integer("attention.key_length"))
    rotated = metadata.integer("rope.dimension_count")
    values = metadata.integer("attention.value_length_mla", metadata.integer("attention.value_length"))
    return {
        **_family(metadata, scores, groups),
        **decoder_config(metadata),
        "num_key_value_heads": heads,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
        "first_k_dense_replace": metadata.integer("leading_dense_block_count", 0),
        "n_routed_experts": routed,
        "n_shared_experts": metadata.integer("expert_shared_count"),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 1.0),
        "norm_topk_prob": metadata.flag("expert_weights_norm", False),
        "n_group": groups,
        "topk_group": metadata.integer("expert_group_used_count", 1),
        "q_lora_rank": metadata.integer("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": metadata.integer("attention.kv_lora_rank"),
        "qk_nope_head_dim": length - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": values,
        "rope_parameters": _rotary(metadata),
    }


def _family(metadata: Metadata, scores: int, groups: int) -> dict[str, Any]:
    if scores == SIGMOID:
        return {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    if scores != SOFTMAX:
        raise UnsupportedModelError(
            f"{metadata.path} scores experts as neither DeepSeek-V2 nor V3 does.",
            f"Its expert_gating_func is {scores}.",
            "Use the checkpoint in transformers' layout.",
        )
    return {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
    }


def _rotary(metadata: Metadata) -> dict[str, Any]:
    scale = round(metadata.number("rope.scaling.yarn_log_multiplier", 0.0) / LOG_MULTIPLIER, 6)
    return rotary(metadata, mscale=scale, mscale_all_dim=scale) if scale else rotary(metadata)


def _notes(metadata: Metadata) -> tuple[str, ...]:
    if metadata.integer("expert_count", 0) not in GROUPED or metadata.has("expert_group_count"):
        return ()
    return (
        "the file says nothing of groups of experts, as DeepSeek's own config does: all compete, as in llama.cpp",
    )


DEEPSEEK2 = GgufArchitecture(
    _config,
    {
        **TRUNK,
        "blk.{layer}.attn_q.weight": place(LAYER + "self_attn.q_proj.weight"),
        "blk.{layer}.attn_q_a.weight": place(LAYER + "self_attn.q_a_proj.weight"),
        "blk.{layer}.attn_q_a_norm.weight": place(LAYER + "self_attn.q_a_layernorm.weight"),
        "blk.{layer}.attn_q_b.weight": place(LAYER + "self_attn.q_b_proj.weight"),
        "blk.{layer}.attn_kv_a_mqa.weight": place(LAYER + "self_attn.kv_a_proj_with_mqa.weight"),
        "blk.{layer}.attn_kv_a_norm.weight": place(LAYER + "self_attn.kv_a_layernorm.weight"),
        "blk.{layer}.attn_kv_b.weight": place(LAYER + "self_attn.kv_b_proj.weight"),
        # Files since April 2025 have its two parts, a matrix a head, that of keys turned round.
        "blk.{layer}.attn_k_b.weight": place(LAYER + "self_attn.k_b_proj.weight"),
        "blk.{layer}.attn_v_b.weight": place(LAYER + "self_attn.v_b_proj.weight"),
        "blk.{layer}.ffn_gate.weight": place(LAYER + "mlp.gate_proj.weight"),
        "blk.{layer}.ffn_up.weight": place(LAYER + "mlp.up_proj.weight"),
        "blk.{layer}.ffn_down.weight": place(LAYER + "mlp.down_proj.weight"),
        "blk.{layer}.ffn_gate_shexp.weight": place(LAYER + "mlp.shared_experts.gate_proj.weight"),
        "blk.{layer}.ffn_up_shexp.weight": place(LAYER + "mlp.shared_experts.up_proj.weight"),
        "blk.{layer}.ffn_down_shexp.weight": place(LAYER + "mlp.shared_experts.down_proj.weight"),
        "blk.{layer}.exp_probs_b.bias": place(LAYER + "mlp.gate.e_score_correction_bias"),
        **experts("mlp.gate", "mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj"),
    },
    _notes,
)
