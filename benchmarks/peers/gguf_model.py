"""A GGUF file of DeepSeek-V2's shape with random weights, for llama.cpp; needs numpy and the ``gguf`` package.

    python -m benchmarks.peers.gguf_model benchmarks/configs/deepseek-v2-lite.json /dev/shm/v2.gguf --kind q8_0

Names, shapes and keys are those that llama.cpp reads (its ``deepseek2``): latents are cached, the matrices that expand
them lie head by head. Routers and norms are float32, everything else is of the kind asked for.
"""

from __future__ import annotations

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.random_weights.values import DEVIATION, RandomPool, all_cores

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCKS = {"bf16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}
"""Values and bytes of a block of each kind."""
POOL_BLOCKS = 524_287
"""Of 32 values; the largest prime below 2**19."""
PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class GgufTensor:
    """``shape`` as numpy has it: rows first."""

    name: str
    shape: tuple[int, ...]
    plain: bool = False
    """Float32 whatever the file's kind."""

    @property
    def count(self) -> int:
        """Values."""
        return math.prod(self.shape)


@click.command()
@click.argument("config", type=click.Path(exists=True, path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(list(BLOCKS)), default="bf16", show_default=True)
def main(config: Path, output: Path, kind: str) -> None:
    """Write OUTPUT with the shapes of CONFIG."""
    start = time.perf_counter()
    size = write_gguf(json.loads(config.read_bytes()), output, kind)
    seconds = time.perf_counter() - start
    print(f"{output}: {size / 1e9:.2f} GB in {seconds:.1f} s")


def tensors(config: dict[str, Any]) -> list[GgufTensor]:
    """All tensors of a model without low-rank queries, in the file's order."""
    hidden, heads, vocabulary = (config[key] for key in ("hidden_size", "num_attention_heads", "vocab_size"))
    nope, rope, value, latent = (
        config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
    found = [
        GgufTensor("token_embd", (vocabulary, hidden)),
        GgufTensor("output_norm", (hidden,), plain=True),
        GgufTensor("output", (vocabulary, hidden)),
    ]
    for number in range(config["num_hidden_layers"]):
        layer = [
            GgufTensor("attn_norm", (hidden,), plain=True),
            GgufTensor("attn_kv_a_norm", (latent,), plain=True),
            GgufTensor("attn_q", (heads * (nope + rope), hidden)),
            GgufTensor("attn_kv_a_mqa", (latent + rope, hidden)),
            GgufTensor("attn_k_b", (heads, latent, nope)),
            GgufTensor("attn_v_b", (heads, value, latent)),
            GgufTensor("attn_output", (hidden, heads * value)),
            GgufTensor("ffn_norm", (hidden,), plain=True),
        ]
        if number < config["first_k_dense_replace"]:
            layer += _feed_forward("", (), hidden, config["intermediate_size"])
        else:
            layer.append(GgufTensor("ffn_gate_inp", (experts, hidden), plain=True))
            layer += _feed_forward("_exps", (experts,), hidden, width)
            layer += _feed_forward("_shexp", (), hidden, width * config["n_shared_experts"])
        found += [GgufTensor(f"blk.{number}.{one.name}", one.shape, one.plain) for one in layer]
    return found


def _feed_forward(suffix: str, lead: tuple[int, ...], hidden: int, width: int) -> list[GgufTensor]:
    return [
        GgufTensor(f"ffn_gate{suffix}", (*lead, width, hidden)),
        GgufTensor(f"ffn_up{suffix}", (*lead, width, hidden)),
        GgufTensor(f"ffn_down{suffix}", (*lead, hidden, width)),
    ]


def file_bytes(tensor: GgufTensor, kind: str) -> int:
    """What a tensor takes in a file of a kind."""
    block, size = (1, 4) if tensor.plain else BLOCKS[kind]
    return tensor.count // block * size


def write_gguf(config: dict[str, Any], output: Path, kind: str) -> int:
    """Write the file with all cores; its bytes."""
    import gguf

    types = {
        "bf16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
        "q4_0": gguf.GGMLQuantizationType.Q4_0,
    }
    plain = gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(output, "deepseek2")
    _add_facts(writer, config, gguf)
    pools = {plain: _pool("f32", gguf, types), types[kind]: _pool(kind, gguf, types)}
    places: list[tuple[int, int, NDArray[np.uint8], int]] = []
    end, used = 0, dict.fromkeys(pools, 0)
    for tensor in tensors(config):
        kept = plain if tensor.plain else types[kind]
        size = file_bytes(tensor, kind)
        stored = (*tensor.shape[:-1], size // math.prod(tensor.shape[:-1]))
        if kept == plain:
            writer.add_tensor_info(f"{tensor.name}.weight", tensor.shape, np.dtype(np.float32), size)
        elif kept == gguf.GGMLQuantizationType.BF16:
            shape = tensor.shape
            writer.add_tensor_info(f"{tensor.name}.weight", shape, np.dtype(np.uint16), size, raw_dtype=kept)
        else:
            writer.add_tensor_info(f"{tensor.name}.weight", stored, np.dtype(np.uint8), size, raw_dtype=kept)
        end = -(-end // writer.data_alignment) * writer.data_alignment
        norm = len(tensor.shape) == 1
        places.append((end, size, _ones(tensor.count) if norm else pools[kept], used[kept]))
        used[kept] += size
        end += size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin: int = -(-output.stat().st_size // writer.data_alignment) * writer.data_alignment
    file = os.open(output, os.O_RDWR)
    try:
        os.ftruncate(file, begin + end)
        with ThreadPoolExecutor(all_cores()) as threads:
            list(threads.map(lambda place: _fill(file, begin + place[0], *place[1:]), places))
    finally:
        os.close(file)
    return begin + end


def _fill(file: int, start: int, size: int, pool: NDArray[np.uint8], place: int) -> None:
    """Bytes of the pool from ``place`` on, around its end; places of quantized pools are those of whole blocks."""
    done = 0
    while done < size:
        first = (place + done) % pool.size
        piece = pool[first : first + min(size - done, PIECE_BYTES)]
        done += os.pwrite(file, piece.data, start + done)


def _ones(count: int) -> NDArray[np.uint8]:
    return np.ones(count, np.float32).view(np.uint8)


def _pool(kind: str, gguf: Any, types: dict[str, Any]) -> NDArray[np.uint8]:
    """Random values of a kind as bytes."""
    values = 32 * POOL_BLOCKS
    if kind == "bf16":
        return RandomPool("bfloat16", values).values.view(np.uint8)
    normal = RandomPool("float32", values, DEVIATION).values
    if kind == "f32":
        return normal.view(np.uint8)
    quantized: NDArray[np.uint8] = gguf.quants.quantize(normal.reshape(-1, 32), types[kind])
    return np.ascontiguousarray(quantized).reshape(-1)


def _add_facts(writer: Any, config: dict[str, Any], gguf: Any) -> None:
    latent, rope, nope = (config[key] for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"))
    scaling = config["rope_scaling"]
    writer.add_name("random weights")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_q_lora_rank(0)  # as no such shape but that of 27 layers is known not to have it
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])
    writer.add_tokenizer_model("none")


if __name__ == "__main__":
    main()
