"""Tiny configs of types with recurrent or convolution layers, some attention among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers
from transformers import PretrainedConfig

if TYPE_CHECKING:
    from collections.abc import Callable


def _qwen3_next() -> PretrainedConfig:
    return transformers.Qwen3NextConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        partial_rotary_factor=0.5,
        max_position_embeddings=256,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=16,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=4,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        bos_token_id=0,
        eos_token_id=1,
    )


RECURRENT: dict[str, Callable[[], PretrainedConfig]] = {"qwen3_next": _qwen3_next}
