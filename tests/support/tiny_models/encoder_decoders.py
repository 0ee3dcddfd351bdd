"""Tiny configs of encoder-decoder models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers
from transformers import PretrainedConfig

if TYPE_CHECKING:
    from collections.abc import Callable


def _switch_transformers() -> PretrainedConfig:
    """As google/switch-base-8, with an expert capacity that an encoder's input exceeds."""
    return transformers.SwitchTransformersConfig(
        vocab_size=149,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_heads=4,
        num_layers=4,
        num_decoder_layers=3,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=1,
        num_experts=6,
        expert_capacity=9,
        router_bias=False,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj="relu",
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        n_positions=128,
    )


def _nllb_moe() -> PretrainedConfig:
    """As facebook/nllb-moe-54b."""
    return transformers.NllbMoeConfig(
        vocab_size=151,
        d_model=64,
        encoder_layers=3,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=6,
        moe_token_dropout=0.2,
        max_position_embeddings=128,
        scale_embedding=True,
        router_bias=False,
        tie_word_embeddings=True,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )


ENCODER_DECODERS: dict[str, Callable[[], PretrainedConfig]] = {
    "nllb_moe": _nllb_moe,
    "switch_transformers": _switch_transformers,
}
"""Name of a tiny model -> its config."""


GAINS: dict[tuple[str, ...], float] = {
    ("shared.weight",): 2.4,
    (".q.weight", ".k.weight"): 0.5,
    (".v.weight", ".o.weight"): 1.7,
    (".wi.weight", ".wo.weight"): 3.0,
    ("EncDecAttention.o.weight",): 0.3,
    ("model.shared.weight",): 2 / 3,
    ("q_proj.weight", "k_proj.weight"): 1.2,
    ("v_proj.weight", "out_proj.weight"): 3.0,
    (".fc1.weight", ".fc2.weight"): 2.0,
    ("cross_attention.out_proj.weight",): 0.3,
}
"""Ends of a parameter's name -> factor; several may fit."""


def sharpen(model: torch.nn.Module) -> None:
    """Make what a decoder says next depend on more than its last token, or than its source alone.

    With weights drawn as for decoders a tied embedding, or the mean of a source, drowns the rest. T5 does not scale its
    products of queries and keys: there they have to be small.
    """
    with torch.no_grad():
        for path, tensor in model.named_parameters():
            for ends, gain in GAINS.items():
                if path.endswith(ends):
                    tensor.mul_(gain)
