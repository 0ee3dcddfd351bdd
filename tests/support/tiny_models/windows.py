"""Tiny configs of decoders whose layers differ: windows, rotary tables, heads and head sizes by the kind of layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers
from transformers import PretrainedConfig

from tests.support.tiny_models.shared_experts import SMALL

if TYPE_CHECKING:
    from collections.abc import Callable


def _beam() -> PretrainedConfig:
    return transformers.BeamConfig(
        **SMALL | {"num_hidden_layers": 4},
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=24,
        sliding_window=9,
        num_experts=12,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
    )


def _cohere2_moe() -> PretrainedConfig:
    return transformers.Cohere2MoeConfig(
        **SMALL | {"num_hidden_layers": 4},
        head_dim=16,
        intermediate_size=24,
        prefix_dense_intermediate_size=72,
        logit_scale=0.25,
        sliding_window=9,
        sliding_window_pattern=3,
        num_experts=7,
        num_experts_per_tok=3,
        num_shared_experts=2,
        expert_selection_fn="sigmoid",
        first_k_dense_replace=1,
    )


def _flint() -> PretrainedConfig:
    return transformers.FlintConfig(
        **SMALL | {"num_hidden_layers": 5},
        head_dim=16,
        intermediate_size=72,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=48,
        sliding_window=9,
        num_experts=11,
        num_experts_per_tok=3,
        mlp_only_layers=[0],
    )


def _kolibri1() -> PretrainedConfig:
    return transformers.Kolibri1Config(
        **SMALL,
        head_dim=16,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=48,
        sliding_window=9,
        num_experts=11,
        num_experts_per_tok=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


def _laguna() -> PretrainedConfig:
    return transformers.LagunaConfig(
        **SMALL,
        head_dim=16,
        intermediate_size=72,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=48,
        sliding_window=9,
        num_experts=11,
        num_experts_per_tok=3,
        num_attention_heads_per_layer=[4, 6, 8],
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        moe_routed_scaling_factor=1.5,
        moe_router_logit_softcapping=3.0,
    )


def _mellum() -> PretrainedConfig:
    return transformers.MellumConfig(
        **SMALL,
        head_dim=16,
        intermediate_size=72,
        moe_intermediate_size=24,
        sliding_window=9,
        num_local_experts=7,
        num_experts_per_tok=3,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        mlp_layer_types=["sparse", "dense", "sparse"],
        rope_parameters={
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 500000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )


def _mimo_v2_flash() -> PretrainedConfig:
    return transformers.MiMoV2FlashConfig(
        **SMALL | {"num_hidden_layers": 4},
        head_dim=24,
        v_head_dim=16,
        intermediate_size=72,
        moe_intermediate_size=24,
        sliding_window=9,
        n_routed_experts=9,
        num_experts_per_tok=3,
        routed_scaling_factor=1.5,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    )


def _gemma4_text() -> PretrainedConfig:
    return transformers.Gemma4TextConfig(
        **SMALL | {"num_hidden_layers": 4},
        head_dim=16,
        global_head_dim=24,
        num_global_key_value_heads=1,
        intermediate_size=72,
        hidden_size_per_layer_input=0,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        attention_k_eq_v=True,
        final_logit_softcapping=30.0,
        enable_moe_block=True,
        num_experts=7,
        top_k_experts=3,
        moe_intermediate_size=24,
    )


WINDOWS: dict[str, Callable[[], PretrainedConfig]] = {
    "beam": _beam,
    "cohere2_moe": _cohere2_moe,
    "flint": _flint,
    "gemma4_text": _gemma4_text,
    "kolibri1": _kolibri1,
    "laguna": _laguna,
    "mellum": _mellum,
    "mimo_v2_flash": _mimo_v2_flash,
}
"""Name of a tiny model, which is its type -> its config."""
