"""Grok-1 (xAI, 2024): 314B parameters, eight experts of which two run.

Written from the release at github.com/xai-org/grok-1 (``run.py`` has the sizes, ``model.py`` the arithmetic). What
sets it apart from Mixtral:

- four norms a layer: attention and experts are normalised before and after, and added to the residual then;
- attention logits are multiplied by ``attn_output_multiplier``, then bent by ``30 tanh(x / 30)``;
- the router's softmax is over all experts, and the two largest values are used as they are, not divided by their sum;
- the embedding is multiplied by ``embedding_multiplier_scale``, the logits by ``output_multiplier_scale``;
- experts have GELU, JAX's, which is the approximation with tanh.

Both checkpoint layouts in use on the hub are read: ``hpcai-tech/grok-1`` (type ``grok-1``) and ``keyfan/grok-1-hf``
(type ``grok``). The modules here have the names of the first.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.core_model_loading import WeightRenaming
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralExperts,
    MixtralRMSNorm,
    MixtralTopKRouter,
)

from moec.compiler.architectures.conversions import stacked_experts
from moec.compiler.architectures.decoder import CausalModel
from moec.compiler.architectures.record import Architecture


@strict
class GrokConfig(MixtralConfig):  # type: ignore[misc]
    """The fields of both layouts; where they leave one out, the release's own value stands."""

    model_type = "grok-1"
    default_theta = 10000.0

    hidden_act: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    attn_output_multiplier: float | int = 0.08838834764831845
    max_attn_value: float | int = 30.0
    embedding_multiplier_scale: float | int = 78.38367176906169
    output_multiplier_scale: float | int = 0.5773502691896257


@strict
class GrokConfigOfKeyfan(GrokConfig):
    """The same fields under the other layout's type."""

    model_type = "grok"


class GrokAttention(MixtralAttention):  # type: ignore[misc]
    """Grouped-query attention whose logits are bent to lie within ``max_attn_value``."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scaling = config.attn_output_multiplier

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        """``[1, T, H]`` to ``[1, T, H]``."""
        attended, _ = super().forward(hidden_states, softcap=self.config.max_attn_value, **options)
        return attended  # type: ignore[no-any-return]


class GrokRouter(MixtralTopKRouter):  # type: ignore[misc]
    """The largest probabilities over all experts, as they are."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[T, H]`` to weights and experts ``[T, K]``."""
        logits = nn.functional.linear(hidden_states, self.weight)
        weights, index = torch.topk(torch.softmax(logits.float(), -1), self.top_k, -1)
        return weights, index


class GrokMoeBlock(nn.Module):
    """Router and experts."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate = GrokRouter(config)
        self.experts = MixtralExperts(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[1, T, H]`` to ``[1, T, H]``."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        weights, index = self.gate(rows)
        output: torch.Tensor = self.experts(rows, index, weights)
        return output.reshape(hidden.shape)


class GrokLayer(nn.Module):
    """Attention and experts, each between two norms."""

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.attn = GrokAttention(config, number)
        self.moe_block = GrokMoeBlock(config)
        self.pre_attn_norm = MixtralRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attn_norm = MixtralRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_moe_norm = MixtralRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_moe_norm = MixtralRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        """``[1, T, H]`` to ``[1, T, H]``."""
        hidden = hidden + self.post_attn_norm(self.attn(self.pre_attn_norm(hidden), **options))
        routed: torch.Tensor = self.post_moe_norm(self.moe_block(self.pre_moe_norm(hidden)))
        return hidden + routed


class GrokForCausalLM(CausalModel):
    """Grok-1 with its head, which is the embedding."""

    config_class = GrokConfig
    layer = GrokLayer

    @staticmethod
    def embedding_scale(config: Any) -> float:
        """The root of the hidden size in the release."""
        return float(config.embedding_multiplier_scale)

    @staticmethod
    def output_scale(config: Any) -> float:
        """The root of a third in the release."""
        return float(config.output_multiplier_scale)


SOURCE = "https://github.com/xai-org/grok-1"
_EXPERTS = stacked_experts(r"\.experts", ".experts", gate="linear", up="linear_v", down="linear_1")

GROK = Architecture(
    GrokConfig, GrokForCausalLM, (WeightRenaming(r"norm\.scale", "norm.weight"), *_EXPERTS), SOURCE
)

GROK_OF_KEYFAN = Architecture(
    GrokConfigOfKeyfan,
    GrokForCausalLM,
    (
        WeightRenaming(r"^transformer\.in_out_embed\.", "model.embed_tokens."),
        WeightRenaming(r"^transformer\.rms_norm\.", "model.norm."),
        WeightRenaming(r"^transformer\.decoder_layer\.", "model.layers."),
        WeightRenaming(r"\.multi_head_attention\.query\.", ".attn.q_proj."),
        WeightRenaming(r"\.multi_head_attention\.key\.", ".attn.k_proj."),
        WeightRenaming(r"\.multi_head_attention\.value\.", ".attn.v_proj."),
        WeightRenaming(r"\.multi_head_attention\.linear\.", ".attn.o_proj."),
        WeightRenaming(r"\.rms_norm\.", ".pre_attn_norm."),
        WeightRenaming(r"\.rms_norm_1\.", ".post_attn_norm."),
        WeightRenaming(r"\.rms_norm_2\.", ".pre_moe_norm."),
        WeightRenaming(r"\.rms_norm_3\.", ".post_moe_norm."),
        WeightRenaming(r"\.router\.", ".moe_block.gate."),
        WeightRenaming(r"\.moe\.", ".moe_block.experts."),
        WeightRenaming(r"norm\.scale", "norm.weight"),
        *_EXPERTS,
    ),
    SOURCE,
)
