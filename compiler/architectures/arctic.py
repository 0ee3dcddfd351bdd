"""Snowflake Arctic (2024): 480B parameters, a dense model beside 128 experts of which two run.

Written from the model card and the configuration of ``Snowflake/snowflake-arctic-instruct`` ("Dense-MoE hybrid
transformer"). A layer has two branches that meet at its end:

    attended = x + attention(norm(x))
    output = attended + dense(norm(attended)) + experts(norm(x))

The experts read what came into the layer, not what attention made of it, so they can be fetched while attention
runs. Without ``parallel_attn_mlp_res``, and in layers that have no experts (``moe_layer_frequency``), a layer is an
ordinary one. Expert capacity (``moe_eval_capacity_factor``, ``moe_token_dropping``) concerns DeepSpeed's training
kernels: no token is dropped in the published inference code. ``use_residual`` is not read there either.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.activations import ACT2FN
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
class ArcticConfig(MixtralConfig):  # type: ignore[misc]
    """Mixtral's fields and which layers have experts; defaults are those of the published configuration class."""

    model_type = "arctic"

    num_key_value_heads: int | None = None
    num_experts_per_tok: int = 1
    moe_layer_frequency: int = 2
    parallel_attn_mlp_res: bool = False


class ArcticMlp(nn.Module):
    """A gated feed-forward network of ``width`` intermediate values."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, width, bias=False)
        self.w2 = nn.Linear(width, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, width, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[1, T, H]`` to ``[1, T, H]``."""
        return self.w2(self.act_fn(self.w1(hidden)) * self.w3(hidden))  # type: ignore[no-any-return]


class ArcticExperts(nn.Module):
    """Router and experts; the weights of the chosen experts add up to one."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate = MixtralTopKRouter(config)
        self.experts = MixtralExperts(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[1, T, H]`` to ``[1, T, H]``."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        _, weights, index = self.gate(rows)
        output: torch.Tensor = self.experts(rows, index, weights)
        return output.reshape(hidden.shape)


class ArcticDense(nn.Module):
    """What stands in the experts' place in layers without them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.mlp = ArcticMlp(config, config.intermediate_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[1, T, H]`` to ``[1, T, H]``."""
        return self.mlp(hidden)  # type: ignore[no-any-return]


class ArcticLayer(nn.Module):
    """Attention and a dense network, beside experts."""

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        routed = (number + 1) % config.moe_layer_frequency == 0
        self.parallel = routed and config.parallel_attn_mlp_res
        self.self_attn = MixtralAttention(config, number)
        self.block_sparse_moe = ArcticExperts(config) if routed else ArcticDense(config)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.parallel:
            self.residual_layernorm = MixtralRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.residual_mlp = ArcticMlp(config, config.hidden_size)

    def forward(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        """``[1, T, H]`` to ``[1, T, H]``."""
        attended: torch.Tensor = hidden + self.self_attn(self.input_layernorm(hidden), **options)[0]
        source = hidden if self.parallel else attended
        routed: torch.Tensor = self.block_sparse_moe(self.post_attention_layernorm(source))
        if self.parallel:
            attended = attended + self.residual_mlp(self.residual_layernorm(attended))
        return attended + routed


class ArcticForCausalLM(CausalModel):
    """Arctic with its head."""

    config_class = ArcticConfig
    layer = ArcticLayer


ARCTIC = Architecture(
    ArcticConfig,
    ArcticForCausalLM,
    stacked_experts(r"\.experts", ".experts", gate="w1", up="w3", down="w2"),
    "https://huggingface.co/Snowflake/snowflake-arctic-instruct",
)
