"""Tiny configs of decoders with shared experts, sigmoid routers and biases on the choice of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers
from transformers import PretrainedConfig

from tests.support.tiny_models.latents import LATENTS

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""What most of these models have in common."""


def _afmoe() -> PretrainedConfig:
    return transformers.AfmoeConfig(
        **SMALL | {"num_hidden_layers": 4},
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=24,
        num_dense_layers=1,
        num_experts=7,
        num_experts_per_tok=3,
        num_shared_experts=2,
        route_scale=1.7,
        global_attn_every_n_layers=3,
        sliding_window=11,
        mup_enabled=True,
    )


def _dots1() -> PretrainedConfig:
    return transformers.Dots1Config(
        **SMALL,
        intermediate_size=96,
        moe_intermediate_size=24,
        n_shared_experts=2,
        n_routed_experts=9,
        n_group=3,
        topk_group=2,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        sliding_window=13,
        max_window_layers=2,
    )


def _exaone_moe() -> PretrainedConfig:
    return transformers.ExaoneMoeConfig(
        **SMALL | {"num_hidden_layers": 4},
        intermediate_size=96,
        sliding_window=10,
        sliding_window_pattern=2,
        moe_intermediate_size=24,
        num_experts=9,
        num_experts_per_tok=3,
        num_shared_experts=1,
        n_group=3,
        topk_group=2,
    )


def _hy_v3() -> PretrainedConfig:
    return transformers.HYV3Config(
        **SMALL,
        head_dim=16,
        intermediate_size=96,
        num_experts=7,
        num_experts_per_tok=3,
        num_shared_experts=1,
        moe_intermediate_size=24,
    )


def _solar_open() -> PretrainedConfig:
    return transformers.SolarOpenConfig(
        **SMALL,
        head_dim=24,
        moe_intermediate_size=24,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_routed_experts=9,
        routed_scaling_factor=1.5,
        n_group=3,
        topk_group=2,
    )


def _hunyuan_v1_moe() -> PretrainedConfig:
    return transformers.HunYuanMoEV1Config(
        **SMALL,
        head_dim=16,
        intermediate_size=40,
        num_experts=5,
        moe_topk=2,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
        pad_token_id=2,
        tie_word_embeddings=True,
    )


def _granitemoeshared() -> PretrainedConfig:
    return transformers.GraniteMoeSharedConfig(
        **SMALL,
        intermediate_size=40,
        num_local_experts=7,
        num_experts_per_tok=3,
        shared_intermediate_size=48,
        embedding_multiplier=0.4,
        logits_scaling=4.0,
        residual_multiplier=0.5,
        attention_multiplier=0.125,
        tie_word_embeddings=True,
    )


def _granitemoe_swa() -> PretrainedConfig:
    return transformers.GraniteMoeSWAConfig(
        **SMALL,
        intermediate_size=40,
        num_local_experts=7,
        num_experts_per_tok=3,
        shared_intermediate_size=48,
        embedding_multiplier=0.4,
        logits_scaling=4.0,
        residual_multiplier=0.5,
        attention_multiplier=0.125,
        sliding_window=9,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        layer_rope_theta=[0.0, 800.0, 500.0],
    )


def _aria_text() -> PretrainedConfig:
    return transformers.AriaTextConfig(
        **SMALL,
        intermediate_size=24,
        moe_num_experts=7,
        moe_topk=3,
        moe_num_shared_experts=2,
        pad_token_id=2,
    )


def _flex_olmo() -> PretrainedConfig:
    return transformers.FlexOlmoConfig(
        **SMALL,
        intermediate_size=40,
        num_experts=5,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        pad_token_id=2,
    )


def _axk1() -> PretrainedConfig:
    return transformers.AXK1Config(
        **SMALL | {"num_key_value_heads": 4},
        **LATENTS,
        q_lora_rank=24,
        intermediate_size=96,
        moe_intermediate_size=24,
        n_shared_experts=1,
        n_routed_experts=12,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
    )


def _glm4_moe_lite() -> PretrainedConfig:
    return transformers.Glm4MoeLiteConfig(
        **SMALL | {"num_key_value_heads": 4},
        **LATENTS,
        q_lora_rank=24,
        intermediate_size=96,
        moe_intermediate_size=24,
        n_shared_experts=1,
        n_routed_experts=9,
        num_experts_per_tok=3,
    )


SHARED_EXPERTS: dict[str, Callable[[], PretrainedConfig]] = {
    "afmoe": _afmoe,
    "aria_text": _aria_text,
    "axk1": _axk1,
    "dots1": _dots1,
    "exaone_moe": _exaone_moe,
    "flex_olmo": _flex_olmo,
    "glm4_moe_lite": _glm4_moe_lite,
    "granitemoe_swa": _granitemoe_swa,
    "granitemoeshared": _granitemoeshared,
    "hunyuan_v1_moe": _hunyuan_v1_moe,
    "hy_v3": _hy_v3,
    "solar_open": _solar_open,
}
"""Name of a tiny model, which is its type -> its config."""
