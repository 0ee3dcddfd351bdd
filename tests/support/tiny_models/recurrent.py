"""Tiny configs of types with recurrent or convolution layers, some attention among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers
from transformers import PretrainedConfig

from tests.support.tiny_models.latents import LATENTS

if TYPE_CHECKING:
    from collections.abc import Callable

COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GATED_DELTA = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
KIMI = {
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    **LATENTS,
}


def _qwen3_next() -> PretrainedConfig:
    return transformers.Qwen3NextConfig(
        **COMMON, **GATED_DELTA, intermediate_size=96, partial_rotary_factor=0.5
    )


def _qwen3_5_moe_text() -> PretrainedConfig:
    rotation = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    }
    return transformers.Qwen3_5MoeTextConfig(**COMMON, **GATED_DELTA, rope_parameters=rotation)


def _qwen3_5_moe() -> PretrainedConfig:
    return transformers.Qwen3_5MoeConfig(
        text_config=_qwen3_5_moe_text().to_dict(),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
        },
        image_token_id=120,
        video_token_id=121,
        vision_start_token_id=122,
        vision_end_token_id=123,
    )


def _kimi_linear() -> PretrainedConfig:
    return transformers.KimiLinearConfig(
        **COMMON, **KIMI, linear_head_dim=24, linear_num_heads=3, linear_conv_kernel_dim=4
    )


def _bailing_hybrid() -> PretrainedConfig:
    return transformers.BailingHybridConfig(
        **COMMON, **KIMI, n_group=2, topk_group=1, first_k_dense_replace=1, head_dim=24
    )


def _granitemoehybrid() -> PretrainedConfig:
    return transformers.GraniteMoeHybridConfig(
        **COMMON,
        intermediate_size=32,
        shared_intermediate_size=48,
        num_hidden_layers=3,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mamba_n_heads=8,
        mamba_n_groups=2,
        mamba_d_state=24,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_chunk_size=16,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.25,
        logits_scaling=3.0,
        position_embedding_type="rope",
    )


def _nemotron_h() -> PretrainedConfig:
    return transformers.NemotronHConfig(
        **COMMON,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"],
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        ssm_state_size=24,
        mamba_num_heads=6,
        mamba_head_dim=20,
        n_groups=2,
        chunk_size=16,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        moe_shared_expert_intermediate_size=48,
        moe_latent_size=32,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.5,
    )


def _lfm2_moe() -> PretrainedConfig:
    return transformers.Lfm2MoeConfig(
        **COMMON,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_key_value_heads=2,
        conv_L_cache=3,
        conv_bias=True,
        num_dense_layers=1,
        num_experts=6,
        num_experts_per_tok=2,
        layer_types=["conv", "full_attention", "conv", "conv"],
    )


def _jamba() -> PretrainedConfig:
    return transformers.JambaConfig(
        **COMMON,
        intermediate_size=48,
        num_hidden_layers=4,
        num_key_value_heads=2,
        num_experts=5,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=4,
        attn_layer_offset=2,
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=12,
    )


def _minimax() -> PretrainedConfig:
    return transformers.MiniMaxConfig(
        **COMMON,
        intermediate_size=48,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=5,
        num_experts_per_tok=2,
        block_size=16,
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        full_attn_alpha_factor=1.5,
        linear_attn_beta_factor=0.75,
        mlp_alpha_factor=0.5,
    )


def _zaya() -> PretrainedConfig:
    rotation = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return transformers.ZayaConfig(
        **COMMON,
        num_hidden_layers=3,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=5,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        router_hidden_size=24,
        cca_time0=3,
        cca_time1=2,
        sliding_window=12,
        layer_types=["hybrid", "hybrid_sliding", "hybrid"],
        rope_parameters={"hybrid": rotation, "hybrid_sliding": rotation},
    )


RECURRENT: dict[str, Callable[[], PretrainedConfig]] = {
    "bailing_hybrid": _bailing_hybrid,
    "granitemoehybrid": _granitemoehybrid,
    "jamba": _jamba,
    "kimi_linear": _kimi_linear,
    "lfm2_moe": _lfm2_moe,
    "minimax": _minimax,
    "nemotron_h": _nemotron_h,
    "qwen3_5_moe": _qwen3_5_moe,
    "qwen3_5_moe_text": _qwen3_5_moe_text,
    "qwen3_next": _qwen3_next,
    "zaya": _zaya,
}
