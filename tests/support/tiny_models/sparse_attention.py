"""Tiny configs of types with a lightning indexer, whose contexts are selected whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_routed_experts": 10,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "index_topk": 256,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _deepseek_v32() -> PretrainedConfig:
    return transformers.DeepseekV32Config(**COMMON, n_group=5, topk_group=3, first_k_dense_replace=1)


def _glm_moe_dsa() -> PretrainedConfig:
    """Its second and third layers share the selection of the first."""
    return transformers.GlmMoeDsaConfig(
        **COMMON, first_k_dense_replace=1, indexer_types=["full", "shared", "shared"]
    )


def _axk2() -> PretrainedConfig:
    return transformers.AXK2Config(**COMMON, first_k_dense_replace=1, gated_norm_rank=6)


def _hy_v4() -> PretrainedConfig:
    return transformers.HYV4Config(**COMMON, hc_mult=2)


def _dots3_note() -> PretrainedConfig:
    """Latents of two sizes: one layer with an indexer, two with a window shorter than the tests' prompts."""
    return transformers.Dots3NoteTextConfig(
        **COMMON,
        layer_types=["indexed_attention", "sliding_attention", "sliding_attention"],
        sliding_window=24,
        head_dim=24,
        swa_num_attention_heads=2,
        swa_num_key_value_heads=2,
        swa_q_lora_rank=20,
        swa_kv_lora_rank=40,
        swa_head_dim=24,
        swa_qk_nope_head_dim=16,
        swa_v_head_dim=12,
        moe_shared_expert_intermediate_size=40,
    )


def _minimax_m3() -> PretrainedConfig:
    """Its indexer selects blocks of positions, here as many as there are."""
    return transformers.MiniMaxM3VLTextConfig(
        vocab_size=133,
        hidden_size=64,
        intermediate_size=24,
        dense_intermediate_size=96,
        shared_intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        rotary_dim=8,
        max_position_embeddings=256,
        num_local_experts=7,
        num_experts_per_tok=3,
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=16,
        index_topk_blocks=16,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )


def _selecting(make: Callable[[], PretrainedConfig]) -> Callable[[], PretrainedConfig]:
    """The same with fewer positions than the tests' prompts have.

    With few heads many positions score 0, all heads being negative; which of equal ones torch takes is its own affair.
    """

    def made() -> PretrainedConfig:
        config = make()
        config.index_topk, config.index_n_heads = 24, 16
        return config

    return made


SPARSE_ATTENTION: dict[str, Callable[[], PretrainedConfig]] = {
    "axk2": _axk2,
    "deepseek_v32": _deepseek_v32,
    "dots3_note_text": _dots3_note,
    "glm_moe_dsa": _glm_moe_dsa,
    "hy_v4": _hy_v4,
    "minimax_m3_vl_text": _minimax_m3,
}
"""Model type -> its config."""

SELECTING: dict[str, Callable[[], PretrainedConfig]] = {
    f"{name}_selecting": _selecting(make)
    for name, make in SPARSE_ATTENTION.items()
    if name != "minimax_m3_vl_text"
}
"""The same types where a part of the context is selected."""
