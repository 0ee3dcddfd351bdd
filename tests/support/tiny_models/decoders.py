"""Tiny configs of the decoder-only types that were first: attention over keys, windows, sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers
from transformers import PretrainedConfig

if TYPE_CHECKING:
    from collections.abc import Callable


def _mixtral() -> PretrainedConfig:
    return transformers.MixtralConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=1,
        max_position_embeddings=256,
        sliding_window=24,
        num_local_experts=5,
        num_experts_per_tok=2,
        bos_token_id=0,
        eos_token_id=1,
    )


def _qwen2_moe() -> PretrainedConfig:
    return transformers.Qwen2MoeConfig(
        vocab_size=151,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=48,
        num_experts=6,
        num_experts_per_tok=4,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=2,
        bos_token_id=0,
        eos_token_id=1,
    )


def _qwen3_moe() -> PretrainedConfig:
    return transformers.Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def _olmoe() -> PretrainedConfig:
    return transformers.OlmoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        num_experts=7,
        num_experts_per_tok=1,
        clip_qkv=2.0,
        pad_token_id=1,
        eos_token_id=2,
    )


def _gpt_oss() -> PretrainedConfig:
    return transformers.GptOssConfig(
        vocab_size=129,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=8,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
        bos_token_id=0,
        eos_token_id=[1, 2],
        pad_token_id=1,
    )


def _glm4_moe() -> PretrainedConfig:
    return transformers.Glm4MoeConfig(
        vocab_size=133,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        moe_intermediate_size=24,
        n_routed_experts=9,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=1.5,
        first_k_dense_replace=1,
        attention_bias=True,
        use_qk_norm=True,
        bos_token_id=0,
        eos_token_id=[1, 2],
        pad_token_id=1,
    )


def _phimoe() -> PretrainedConfig:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
        "long_factor": [1.1, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0],
        "short_mscale": 1.1,
        "long_mscale": 1.25,
        "original_max_position_embeddings": 256,
    }
    return transformers.PhimoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters=rope,
        num_local_experts=6,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
        sliding_window=2047,
        bos_token_id=0,
        eos_token_id=1,
    )


def _granitemoe() -> PretrainedConfig:
    return transformers.GraniteMoeConfig(
        vocab_size=139,
        hidden_size=64,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        num_local_experts=10,
        num_experts_per_tok=4,
        embedding_multiplier=3.0,
        logits_scaling=4.0,
        residual_multiplier=0.5,
        attention_multiplier=0.125,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )


def _ernie4_5_moe() -> PretrainedConfig:
    return transformers.Ernie4_5_MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        moe_intermediate_size=24,
        moe_k=3,
        moe_num_experts=7,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _minimax_m2() -> PretrainedConfig:
    return transformers.MiniMaxM2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        num_local_experts=11,
        num_experts_per_tok=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        bos_token_id=0,
        eos_token_id=1,
    )


DECODERS: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
    "glm4_moe": _glm4_moe,
    "phimoe": _phimoe,
    "granitemoe": _granitemoe,
    "ernie4_5_moe": _ernie4_5_moe,
    "minimax_m2": _minimax_m2,
}
"""Name of a tiny model, which is its type -> its config."""
