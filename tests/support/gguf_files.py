"""Tiny GGUF files, made of tiny checkpoints by the gguf package's own names and writer, as llama.cpp's converter would.

What the compiler knows of names, keys and permutations is not used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PretrainedConfig

Tensors = dict[str, torch.Tensor]

ARCHITECTURES = {
    "deepseek_v2": MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": MODEL_ARCH.DEEPSEEK2,
    "gpt_oss": MODEL_ARCH.GPT_OSS,
    "mixtral": MODEL_ARCH.LLAMA,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
}


@dataclass(frozen=True)
class Written:
    """A GGUF file, and what it means."""

    file: Path
    plain: Path
    """The same model as a checkpoint of transformers, with the dequantized values in float32."""


def write_gguf(
    checkpoint: Path,
    output: Path,
    kind: GGMLQuantizationType | Callable[[str], GGMLQuantizationType],
    *,
    split_latents: bool = True,
    parts: int = 1,
    more: Callable[[GGUFWriter], None] = lambda _: None,
) -> Written:
    """Convert a checkpoint.

    Args:
        checkpoint: of a type in ``ARCHITECTURES``, float32.
        output: the folder to make.
        kind: the type of matrices, or what says it for a GGUF name. Those whose rows are no whole blocks, routers,
            norms and biases stay float32.
        split_latents: write ``kv_b`` as its two parts, as files since April 2025 do.
        parts: files.
        more: writes further metadata.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    architecture = ARCHITECTURES[config.model_type]
    output.mkdir(parents=True)
    writer = GGUFWriter(
        None if parts > 1 else output / "model.gguf",
        gguf.MODEL_ARCH_NAMES[architecture],
        split_max_tensors=-(-len(_stacked(tensors)) // parts) + 1 if parts > 1 else 0,
    )
    _metadata(writer, config, split_latents=split_latents)
    more(writer)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    meant: Tensors = {}
    for name, value in _stacked(tensors).items():
        for own, made, back in _converted(name, value, config, split_latents=split_latents):
            general = names.get_name(own, try_suffixes=(".weight", ".bias"))
            assert general is not None, own
            wanted = kind if isinstance(kind, GGMLQuantizationType) else kind(general)
            used = wanted if _quantizable(general, made, wanted) else GGMLQuantizationType.F32
            data = quantize(made.numpy(), used)
            writer.add_tensor(general, data, raw_dtype=used)
            value_meant = torch.from_numpy(np.array(gguf.dequantize(data, used))).view(made.shape)
            meant.update(back(value_meant))
    writer.write_header_to_file(output / "model.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain = output / "plain"
    plain.mkdir()
    config.save_pretrained(plain)
    save_file(_unstacked(_joined(meant), tensors), plain / "model.safetensors")
    return Written(sorted(output.glob("*.gguf"))[0], plain)


def quantize(values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[Any]:
    """Rows of blocks. Super-blocks, which the package only reads, are made here, not well: random codes and scales."""
    if kind not in SUPER_BLOCKS:
        made: NDArray[Any] = gguf.quantize(np.ascontiguousarray(values), kind)
        return made
    values_of, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(values.shape[-1])
    blocks = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // values_of, size), np.uint8)
    for offset, scale in SUPER_BLOCKS[kind].items():
        halves = rng.uniform(0.5, 1.0, blocks.shape[:-1]) * scale * values.std()
        blocks[..., offset : offset + 2] = halves.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


SUPER_BLOCKS: dict[GGMLQuantizationType, dict[int, float]] = {
    GGMLQuantizationType.Q4_K: {0: 1 / 100, 2: 1 / 12},
    GGMLQuantizationType.Q5_K: {0: 1 / 200, 2: 1 / 12},
    GGMLQuantizationType.Q6_K: {208: 1 / 1200},
}
"""Type -> where its float16 factors are in a block, and about what they are to values of deviation 1."""


def _quantizable(name: str, value: torch.Tensor, kind: GGMLQuantizationType) -> bool:
    block = gguf.GGML_QUANT_SIZES[kind][0]
    matrix = value.dim() > 1 and name.endswith(".weight")
    return matrix and "ffn_gate_inp" not in name and value.shape[-1] % block == 0


def _stacked(tensors: Tensors) -> Tensors:
    """All experts' matrices of a kind as one tensor."""
    result: Tensors = {}
    stacks: dict[str, list[torch.Tensor]] = {}
    for name in sorted(tensors, key=lambda name: [int(p) if p.isdigit() else p for p in name.split(".")]):
        before, _, after = name.partition(".experts.")
        number, _, matrix = after.partition(".")
        if number.isdigit():
            stacks.setdefault(f"{before}.experts.{matrix}", []).append(tensors[name])
        else:
            result[name] = tensors[name]
    return result | {name: torch.stack(stack) for name, stack in stacks.items()}


def _unstacked(meant: Tensors, tensors: Tensors) -> Tensors:
    result: Tensors = {}
    for name in tensors:
        before, _, after = name.partition(".experts.")
        number, _, matrix = after.partition(".")
        whole = meant[f"{before}.experts.{matrix}"][int(number)] if number.isdigit() else meant[name]
        result[name] = whole.contiguous().clone()
    return result


def _converted(
    name: str, value: torch.Tensor, config: PretrainedConfig, *, split_latents: bool
) -> list[tuple[str, torch.Tensor, Callable[[torch.Tensor], Tensors]]]:
    """What the converter makes of a tensor: under which of its names, what, and how it is undone."""
    if config.model_type == "mixtral" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        shape = value.shape
        turned = value.view(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)
        return [
            (
                name,
                turned.contiguous(),
                lambda t: {name: t.view(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)},
            )
        ]
    if name.endswith("kv_b_proj.weight") and split_latents:
        nope, v = config.qk_nope_head_dim, config.v_head_dim
        heads_of = value.view(-1, nope + v, value.shape[-1])
        keys, values = heads_of[:, :nope], heads_of[:, nope:]
        return [
            (
                name.replace("kv_b", "k_b"),
                keys.transpose(1, 2).contiguous(),
                lambda t: {f"{name}:k": t.transpose(1, 2)},
            ),
            (name.replace("kv_b", "v_b"), values.contiguous(), lambda t: {f"{name}:v": t}),
        ]
    if config.model_type == "gpt_oss" and "experts" in name:
        return _gpt_oss(name, value)
    if name.endswith("sinks"):
        return [(f"{name}.weight", value, lambda t: {name: t})]
    if name.endswith("e_score_correction_bias"):
        return [
            (name.replace("e_score_correction_bias", "e_score_correction.bias"), value, lambda t: {name: t})
        ]
    return [(name, value, lambda t: {name: t})]


def _gpt_oss(
    name: str, value: torch.Tensor
) -> list[tuple[str, torch.Tensor, Callable[[torch.Tensor], Tensors]]]:
    bias = name.endswith("_bias")
    base, suffix = name.removesuffix("_bias"), ".bias" if bias else ".weight"
    rows = value if bias else value.transpose(1, 2)
    if "gate_up" not in name:
        return [(f"{base}{suffix}", rows.contiguous(), lambda t: {name: t if bias else t.transpose(1, 2)})]
    return [
        (
            base.replace("gate_up", part) + suffix,
            rows[:, first::2].contiguous(),
            partial(_named, f"{name}:{part}"),
        )
        for first, part in enumerate(("gate", "up"))
    ]


def _named(name: str, value: torch.Tensor) -> Tensors:
    return {name: value}


def _joined(meant: Tensors) -> Tensors:
    result = {name: value for name, value in meant.items() if ":" not in name}
    for name in {name.partition(":")[0] for name in meant if ":" in name}:
        if "kv_b" in name:
            joined = torch.cat((meant[f"{name}:k"], meant[f"{name}:v"]), 1)
            result[name] = joined.reshape(-1, joined.shape[-1])
        else:
            rows = torch.stack((meant[f"{name}:gate"], meant[f"{name}:up"]), 2).flatten(1, 2)
            result[name] = rows if name.endswith("_bias") else rows.transpose(1, 2)
    return result


def _metadata(writer: GGUFWriter, config: PretrainedConfig, *, split_latents: bool) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_expert_used_count(config.num_experts_per_tok)
    _FAMILIES[config.model_type](writer, config, split_latents)


def _plain_heads(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.head_dim:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def _mixtral(writer: GGUFWriter, config: PretrainedConfig, _: bool) -> None:
    _plain_heads(writer, config)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_count(config.num_local_experts)


def _qwen3_moe(writer: GGUFWriter, config: PretrainedConfig, _: bool) -> None:
    _plain_heads(writer, config)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _gpt_oss_metadata(writer: GGUFWriter, config: PretrainedConfig, _: bool) -> None:
    _plain_heads(writer, config)
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def _deepseek(writer: GGUFWriter, config: PretrainedConfig, split_latents: bool) -> None:
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
    writer.add_head_count_kv(1 if split_latents else config.num_attention_heads)
    if split_latents:
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(head)
        writer.add_value_length_mla(config.v_head_dim)
    else:
        writer.add_key_length(head)
        writer.add_value_length(config.v_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_vocab_size(config.vocab_size)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    if config.rope_parameters.get("mscale_all_dim") is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * config.rope_parameters["mscale_all_dim"])
    if config.model_type == "deepseek_v3":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(config.norm_topk_prob)
    if config.n_group:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


_FAMILIES = {
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss_metadata,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}
