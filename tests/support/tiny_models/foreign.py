"""Tiny configs of models whose experts transformers keeps off its experts interface."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import transformers
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from tests.support.tiny_models.latents import LATENTS
from tests.support.tiny_models.shared_experts import SMALL

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _dbrx() -> PretrainedConfig:
    return transformers.DbrxConfig(
        d_model=64,
        n_heads=4,
        n_layers=3,
        max_seq_len=256,
        vocab_size=131,
        attn_config={"clip_qkv": 2.0, "kv_n_heads": 2, "rope_theta": 500000.0},
        ffn_config={
            "ffn_hidden_size": 24,
            "moe_num_experts": 7,
            "moe_top_k": 3,
            "moe_normalize_expert_weights": 1.0,
        },
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def _jetmoe() -> PretrainedConfig:
    return transformers.JetMoeConfig(
        vocab_size=131,
        hidden_size=64,
        num_hidden_layers=3,
        num_key_value_heads=3,
        kv_channels=16,
        intermediate_size=24,
        max_position_embeddings=256,
        num_local_experts=5,
        num_experts_per_tok=2,
        bos_token_id=0,
        eos_token_id=1,
    )


def _longcat_flash() -> PretrainedConfig:
    small = {key: value for key, value in SMALL.items() if "layers" not in key}
    return transformers.LongcatFlashConfig(
        **small | {"num_key_value_heads": 4},
        **LATENTS,
        head_dim=8,
        num_layers=2,
        q_lora_rank=24,
        ffn_hidden_size=72,
        expert_ffn_hidden_size=24,
        n_routed_experts=7,
        zero_expert_num=4,
        moe_topk=4,
        routed_scaling_factor=1.5,
    )


LLAMA4: dict[str, Any] = SMALL | {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "intermediate_size": 24,
    "intermediate_size_mlp": 72,
    "num_local_experts": 5,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 3,
    "attention_chunk_size": 11,
    "floor_scale": 16,
}


def _llama4_text() -> PretrainedConfig:
    return transformers.Llama4TextConfig(**LLAMA4)


def _llama4() -> PretrainedConfig:
    return transformers.Llama4Config(
        text_config=LLAMA4 | {"interleave_moe_layer_step": 1, "use_qk_norm": False},
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "vision_output_dim": 32,
            "image_size": 28,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        image_token_index=200,
    )


FOREIGN: dict[str, Callable[[], PretrainedConfig]] = {"llama4": _llama4, "llama4_text": _llama4_text}
"""Name of a tiny model, which is its type -> its config; parameters are where transformers has them."""

REMADE: dict[str, Callable[[], PretrainedConfig]] = {
    "dbrx": _dbrx,
    "jetmoe": _jetmoe,
    "longcat_flash": _longcat_flash,
}
"""As ``FOREIGN``; moec's experts have other parameters than transformers', so these cannot be compared by name."""


def drop_identity_experts(folder: Path) -> None:
    """Leave only the experts that LongCat-Flash's checkpoints have.

    transformers 5.23 has rows of gate and up for the experts that compute nothing, writes them, and does not load a
    checkpoint without them; the model's own code (and transformers 4.57) has no weights there.
    """
    file = folder / "model.safetensors"
    count = _longcat_flash().n_routed_experts
    kept = {
        name: tensor
        for name, tensor in load_file(file).items()
        if not ((found := re.search(r"experts\.(\d+)\.", name)) and int(found[1]) >= count)
    }
    save_file(kept, file, metadata={"format": "pt"})
