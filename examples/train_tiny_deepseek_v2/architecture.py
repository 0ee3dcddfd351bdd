"""The model: a small DeepSeek-V2 with every part of the published one."""

from __future__ import annotations

import re

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from examples.train_tiny_deepseek_v2.tokenizer import BEGIN_ID, END_ID, PAD_ID


def make_config(vocab_size: int) -> DeepseekV2Config:
    """DeepSeek-V2 with every part of the published one: both latents, a dense layer, shared experts."""
    return DeepseekV2Config(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_hidden_layers=7,
        first_k_dense_replace=1,
        num_attention_heads=6,
        num_key_value_heads=6,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=4,
        routed_scaling_factor=2.5,
        topk_method="greedy",
        norm_topk_prob=False,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


def make_model(config: DeepseekV2Config, seed: int) -> DeepseekV2ForCausalLM:
    """Fresh float32 weights; what writes to the residual stream starts smaller."""
    torch.manual_seed(seed)
    model = DeepseekV2ForCausalLM(config)
    scale = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and re.search(r"o_proj|down_proj", name):
                weight.mul_(scale)
    return model
