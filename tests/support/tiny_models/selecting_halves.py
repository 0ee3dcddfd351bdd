"""Tiny configs of models that see or hear, whose language model attends to selected positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers
from transformers import PretrainedConfig

from tests.support.tiny_models.latents import LATENTS
from tests.support.tiny_models.shared_experts import SMALL
from tests.support.tiny_models.sparse_attention import SPARSE_ATTENTION
from tests.support.tiny_models.text_halves import EYES, TOWER

if TYPE_CHECKING:
    from collections.abc import Callable


def _minimax_m3_vl() -> PretrainedConfig:
    return transformers.MiniMaxM3VLConfig(
        text_config=SPARSE_ATTENTION["minimax_m3_vl_text"]().to_dict(),
        vision_config={
            **TOWER,
            "image_size": 28,
        },
        projector_hidden_size=64,
        image_token_index=220,
        video_token_index=221,
    )


def _mistral_large4() -> PretrainedConfig:
    return transformers.MistralLarge4Config(
        text_config={
            **SMALL | {"num_key_value_heads": 4, "num_hidden_layers": 4},
            **LATENTS,
            "intermediate_size": 72,
            "moe_intermediate_size": 24,
            "n_routed_experts": 9,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "index_topk": 256,
            "index_head_dim": 16,
            "index_n_heads": 4,
            "no_rope_layer_interval": 3,
        },
        vision_config={
            "model_type": "pixtral",
            **TOWER,
            "head_dim": 16,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=220,
    )


def _dots3_note() -> PretrainedConfig:
    return transformers.Dots3NoteConfig(
        text_config=SPARSE_ATTENTION["dots3_note_text"]().to_dict(),
        vision_config={
            **TOWER,
            "mlp_layer_types": ["dense", "dense"],
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
        },
        audio_config={
            **TOWER,
            "feature_size": 16,
            "downsample_hidden_size": 16,
            "adapter_input_size": 32,
            "adapter_out_dim": 64,
        },
        image_token_id=220,
        video_token_id=221,
        audio_token_id=219,
    )


def _glm5_next() -> PretrainedConfig:
    return transformers.Glm5NextConfig(
        text_config={
            **SMALL | {"num_hidden_layers": 4, "num_key_value_heads": 4},
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "intermediate_size": 72,
            "moe_intermediate_size": 24,
            "n_routed_experts": 9,
            "num_experts_per_tok": 3,
            "n_group": 3,
            "topk_group": 2,
            "swiglu_limit": 0.5,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "layer_types": [
                "linear_attention",
                "indexed_attention",
                "indexed_attention",
                "linear_attention",
            ],
            "indexer_types": ["full", "full", "shared", "full"],
            "index_topk": 256,
            "index_kpool": 4,
            "index_head_dim": 16,
            "index_n_heads": 4,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "hc_sinkhorn_iters": 4,
            "pad_token_id": None,
        },
        vision_config={**EYES, "out_hidden_size": 64, "projection_intermediate_size": 48, "image_size": 28},
        image_token_id=220,
        video_token_id=221,
    )


SELECTING_HALVES: dict[str, Callable[[], PretrainedConfig]] = {
    "dots3_note": _dots3_note,
    "glm5_next": _glm5_next,
    "minimax_m3_vl": _minimax_m3_vl,
    "mistral_large4": _mistral_large4,
}
"""Name of a tiny model, which is its type -> its config."""
