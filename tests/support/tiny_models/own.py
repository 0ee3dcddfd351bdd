"""Tiny checkpoints of models that transformers does not have, tensor by tensor as the hub has the real ones.

Only names and shapes are here, from the hub's files; nothing of moec's own modules is used.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict

if TYPE_CHECKING:
    from pathlib import Path

Shapes = dict[str, tuple[int, ...]]

GROK: dict[str, Any] = {
    "architectures": ["Grok1ModelForCausalLM"],
    "attn_output_multiplier": 0.9,
    "bos_token_id": 1,
    "embedding_multiplier_scale": 1.7,
    "eos_token_id": 2,
    "hidden_size": 64,
    "intermediate_size": 48,
    "max_attn_value": 30.0,
    "max_position_embeddings": 256,
    "model_type": "grok-1",
    "num_attention_heads": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "output_multiplier_scale": 0.5773502691896257,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 133,
}
"""As ``hpcai-tech/grok-1`` has it; logits are large enough for the cap to show."""

GROK_OF_KEYFAN: dict[str, Any] = {
    "architectures": ["GrokForCausalLM"],
    "attention_dropout": 0.0,
    "attn_output_multiplier": 0.9,
    "bos_token_id": 1,
    "embedding_multiplier_scale": 1.7,
    "eos_token_id": 2,
    "hidden_act": "gelu_new",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    "model_type": "grok",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 6,
    "output_multiplier_scale": 0.5773502691896257,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "use_cache": True,
    "vocab_size": 131,
}
"""As ``keyfan/grok-1-hf`` has it."""

ARCTIC: dict[str, Any] = {
    "architectures": ["ArcticForCausalLM"],
    "attention_dropout": 0,
    "bos_token_id": 129,
    "enable_expert_tensor_parallelism": False,
    "eos_token_id": 130,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 256,
    "max_sequence_length": 256,
    "model_type": "arctic",
    "moe_eval_capacity_factor": 1,
    "moe_layer_frequency": 1,
    "moe_min_capacity": 0,
    "moe_token_dropping": True,
    "moe_train_capacity_factor": 1,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 11,
    "parallel_attn_mlp_res": True,
    "quantization": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_residual": True,
    "vocab_size": 131,
}
"""As ``Snowflake/snowflake-arctic-instruct`` has it."""

ARCTIC_MIXED = ARCTIC | {"moe_layer_frequency": 2, "parallel_attn_mlp_res": False, "num_hidden_layers": 4}
"""Every second layer with experts, one branch a layer: what the configuration class also describes."""


def grok_shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of the layout that ``hpcai-tech/grok-1`` has; the head is the embedding."""
    H, W, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = H // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (V, H), "model.norm.scale": (H,)}
    for layer in (f"model.layers.{number}" for number in range(config["num_hidden_layers"])):
        shapes |= {f"{layer}.attn.{part}_proj.weight": (H, H) for part in "qo"}
        shapes |= {f"{layer}.attn.{part}_proj.weight": (keys, H) for part in "kv"}
        shapes |= {
            f"{layer}.{when}_{what}_norm.scale": (H,) for when in ("pre", "post") for what in ("attn", "moe")
        }
        shapes[f"{layer}.moe_block.gate.weight"] = (config["num_experts"], H)
        for expert in (f"{layer}.moe_block.experts.{e}" for e in range(config["num_experts"])):
            shapes |= {f"{expert}.linear.weight": (W, H), f"{expert}.linear_v.weight": (W, H)}
            shapes[f"{expert}.linear_1.weight"] = (H, W)
    return shapes


def grok_of_keyfan_shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of the layout that ``keyfan/grok-1-hf`` has."""
    H, W, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = H // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: Shapes = {"transformer.in_out_embed.weight": (V, H), "transformer.rms_norm.weight": (H,)}
    for layer in (f"transformer.decoder_layer.{number}" for number in range(config["num_hidden_layers"])):
        shapes |= {f"{layer}.multi_head_attention.{part}.weight": (H, H) for part in ("query", "linear")}
        shapes |= {f"{layer}.multi_head_attention.{part}.weight": (keys, H) for part in ("key", "value")}
        shapes |= {f"{layer}.rms_norm{suffix}.weight": (H,) for suffix in ("", "_1", "_2", "_3")}
        shapes[f"{layer}.router.weight"] = (config["num_local_experts"], H)
        for expert in (f"{layer}.moe.{e}" for e in range(config["num_local_experts"])):
            shapes |= {f"{expert}.linear.weight": (W, H), f"{expert}.linear_v.weight": (W, H)}
            shapes[f"{expert}.linear_1.weight"] = (H, W)
    return shapes


def arctic_shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of ``Snowflake/snowflake-arctic-instruct``."""
    H, W, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = H // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: Shapes = {
        "model.embed_tokens.weight": (V, H),
        "model.norm.weight": (H,),
        "lm_head.weight": (V, H),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": (H, H) for part in "qo"}
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": (keys, H) for part in "kv"}
        shapes |= {f"{layer}.{norm}.weight": (H,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if (number + 1) % config["moe_layer_frequency"]:
            shapes |= _network(f"{layer}.block_sparse_moe.mlp", H, W)
            continue
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (config["num_local_experts"], H)
        for expert in range(config["num_local_experts"]):
            shapes |= _network(f"{layer}.block_sparse_moe.experts.{expert}", H, W)
        if config["parallel_attn_mlp_res"]:
            shapes[f"{layer}.residual_layernorm.weight"] = (H,)
            shapes |= _network(f"{layer}.residual_mlp", H, H)
    return shapes


def _network(prefix: str, H: int, W: int) -> Shapes:
    return {f"{prefix}.w1.weight": (W, H), f"{prefix}.w2.weight": (H, W), f"{prefix}.w3.weight": (W, H)}


OWN = {
    "arctic": (ARCTIC, arctic_shapes),
    "arctic-mixed": (ARCTIC_MIXED, arctic_shapes),
    "grok": (GROK_OF_KEYFAN, grok_of_keyfan_shapes),
    "grok-1": (GROK, grok_shapes),
}
"""Name of a tiny model -> its config and the shapes of its tensors."""


def save_own(name: str, folder: Path, seed: int, dtype: torch.dtype, shard: str) -> Path:
    """Write a tiny checkpoint of ``OWN[name]`` with random weights; equal seeds give equal weights."""
    config, shapes = OWN[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensors = {path: torch.empty(shape) for path, shape in shapes(config).items()}
        for path, tensor in tensors.items():
            _fill(path, tensor)
    folder.mkdir(parents=True, exist_ok=True)
    written = {path: tensor.to(dtype) for path, tensor in tensors.items()}
    save_torch_state_dict(written, folder, max_shard_size=shard)
    stored = {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config | stored, indent=1))
    return folder


def _fill(path: str, tensor: torch.Tensor) -> None:
    if tensor.dim() == 1:
        torch.nn.init.normal_(tensor, mean=1.0, std=0.1)
    elif "embed" in path:
        torch.nn.init.normal_(tensor, std=0.5)
    else:
        torch.nn.init.normal_(tensor, std=tensor.shape[-1] ** -0.5)
