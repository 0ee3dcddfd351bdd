"""Tiny configs of models that see or hear as well, whose language model alone compiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers
from transformers import PretrainedConfig

from tests.support.tiny_models.latents import LATENTS
from tests.support.tiny_models.shared_experts import SMALL
from tests.support.tiny_models.windows import WINDOWS

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT: dict[str, Any] = SMALL | {"head_dim": 16, "intermediate_size": 72, "moe_intermediate_size": 24}
EYES: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
"""Of what sees or hears, in the terms of most configs."""
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}


def _qwen3_vl_moe() -> PretrainedConfig:
    return transformers.Qwen3VLMoeConfig(
        text_config={
            **TEXT,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "mlp_only_layers": [1],
            "tie_word_embeddings": False,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        vision_config={
            **EYES,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=220,
        video_token_id=221,
        vision_start_token_id=122,
        vision_end_token_id=123,
    )


def _qwen3_omni_moe() -> PretrainedConfig:
    text = {
        **TEXT,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "rope_parameters": {**MROPE, "mrope_interleaved": True},
    }
    small = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    return transformers.Qwen3OmniMoeConfig(
        thinker_config={
            "text_config": text,
            "vision_config": {
                **EYES,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            "audio_config": {**small, "output_dim": 64, "num_mel_bins": 16, "downsample_hidden_size": 16},
            "audio_token_id": 219,
            "vision_start_token_id": 222,
            "image_token_id": 220,
            "video_token_id": 221,
        },
        enable_audio_output=False,
    )


def _glm4v_moe() -> PretrainedConfig:
    return transformers.Glm4vMoeConfig(
        text_config={
            **TEXT,
            "n_routed_experts": 9,
            "num_experts_per_tok": 3,
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
        },
        vision_config={**EYES, "out_hidden_size": 64, "image_size": 28},
        image_token_id=220,
        video_token_id=221,
    )


def _ernie4_5_vl_moe() -> PretrainedConfig:
    text = {key: value for key, value in TEXT.items() if key != "moe_intermediate_size"}
    return transformers.Ernie4_5_VLMoeConfig(
        text_config={
            **text,
            "moe_intermediate_size": [24, 16],
            "moe_num_experts": 7,
            "moe_k": 3,
            "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]},
        },
        vision_config=EYES,
        image_token_id=220,
        video_token_id=221,
    )


def _aria() -> PretrainedConfig:
    return transformers.AriaConfig(
        text_config={
            **SMALL,
            "intermediate_size": 24,
            "moe_num_experts": 7,
            "moe_topk": 3,
            "moe_num_shared_experts": 2,
        },
        vision_config={
            **TOWER,
            "image_size": 28,
            "patch_size": 14,
        },
        projector_patch_to_query_dict={4: 2},
        image_token_index=220,
    )


def _gemma4() -> PretrainedConfig:
    return transformers.Gemma4Config(
        text_config=WINDOWS["gemma4_text"]().to_dict(),
        vision_config={
            **TOWER,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "position_embedding_size": 64,
        },
        image_token_id=220,
        video_token_id=221,
        audio_token_id=219,
    )


def _step3p7() -> PretrainedConfig:
    return transformers.Step3p7Config(
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "n_routed_experts": 7,
            "num_experts_per_tok": 3,
            "share_expert_dim": 40,
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "num_sliding_attention_heads": 6,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "moe_router_scaling_factor": 1.5,
            "swiglu_limits": [0.0, 0.0, 0.5, 0.0],
            "swiglu_limits_shared": [0.0, 0.0, 0.5, 0.0],
            "rope_theta": [500000.0, 10000.0, 10000.0, 500000.0],
            "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5],
        },
        vision_config={"width": 32, "layers": 2, "heads": 2, "image_size": 28},
        image_token_id=220,
    )


def _mistral4() -> PretrainedConfig:
    return transformers.Mistral4Config(
        **SMALL | {"num_key_value_heads": 4},
        **LATENTS,
        q_lora_rank=24,
        intermediate_size=72,
        moe_intermediate_size=24,
        n_shared_experts=1,
        n_routed_experts=9,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        pad_token_id=2,
    )


def _deepseek_ocr2() -> PretrainedConfig:
    return transformers.DeepseekOcr2Config(
        text_config={
            **SMALL,
            "intermediate_size": 72,
            "moe_intermediate_size": 24,
            "n_routed_experts": 7,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        vision_config={
            "sam_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "mlp_dim": 48,
                "global_attn_indexes": [1],
                "downsample_channels": [16, 32],
            },
            "encoder_config": {
                **TOWER,
                "num_key_value_heads": 2,
            },
        },
        image_token_id=220,
    )


TEXT_HALVES: dict[str, Callable[[], PretrainedConfig]] = {
    "aria": _aria,
    "deepseek_ocr2": _deepseek_ocr2,
    "ernie4_5_vl_moe": _ernie4_5_vl_moe,
    "gemma4": _gemma4,
    "glm4v_moe": _glm4v_moe,
    "mistral4": _mistral4,
    "qwen3_omni_moe": _qwen3_omni_moe,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "step3p7": _step3p7,
}
"""Name of a tiny model, which is its type -> its config."""
