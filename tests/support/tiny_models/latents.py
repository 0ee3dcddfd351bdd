"""Tiny configs of DeepSeek's types, whose attention is over latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers
from transformers import PretrainedConfig

if TYPE_CHECKING:
    from collections.abc import Callable

LATENTS = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    **LATENTS,
}
"""Alike in all three."""
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 64,
}


def _deepseek_v2_lite(layers: int = 3) -> PretrainedConfig:
    return transformers.DeepseekV2Config(
        vocab_size=131,
        q_lora_rank=None,
        n_routed_experts=10,
        n_shared_experts=2,
        num_experts_per_tok=3,
        topk_method="greedy",
        norm_topk_prob=False,
        rope_parameters=YARN,
        **SIZES | {"num_hidden_layers": layers},
    )


def _deepseek_v2() -> PretrainedConfig:
    return transformers.DeepseekV2Config(
        vocab_size=128,
        q_lora_rank=24,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=2,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=4.0,
        **SIZES,
    )


def _deepseek_v3() -> PretrainedConfig:
    return transformers.DeepseekV3Config(
        vocab_size=157,
        q_lora_rank=24,
        n_routed_experts=12,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        rope_parameters=YARN,
        **SIZES,
    )


LATENT_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "deepseek_v2_lite": _deepseek_v2_lite,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}
"""Name of a tiny model -> its config. The name is the model type, except ``deepseek_v2_lite``."""

DEEPER: dict[str, Callable[[], PretrainedConfig]] = {
    "deepseek_v2_lite_6": lambda: _deepseek_v2_lite(layers=6),
}
"""For what divides layers; with tests of their own."""
