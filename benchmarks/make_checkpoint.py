"""Write a checkpoint with random weights and a realistic shape, for measuring.

python benchmarks/make_checkpoint.py qwen3-moe-2gb /tmp/qwen3-moe-2gb
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Callable

INITIAL_DEVIATION = 0.02


def _qwen3_moe_2gb() -> Any:
    return transformers.Qwen3MoeConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        moe_intermediate_size=576,
        num_hidden_layers=8,
        num_attention_heads=24,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=48,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        norm_topk_prob=True,
    )


def _deepseek_v2_lite_4_layers() -> Any:
    return transformers.DeepseekV2Config(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=1,
        topk_method="greedy",
        norm_topk_prob=False,
        max_position_embeddings=4096,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3-moe-2gb": _qwen3_moe_2gb,
    "deepseek-v2-lite-4-layers": _deepseek_v2_lite_4_layers,
}
"""Configs by name. The second has DeepSeek-V2-Lite's real shape in every layer, but 4 of its 27 layers."""


def make_checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the checkpoint ``name`` into ``folder``."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, INITIAL_DEVIATION)
    model.save_pretrained(folder)


@click.command()
@click.argument("name", type=click.Choice(list(CONFIGS)))
@click.argument("folder", type=click.Path(path_type=Path))
def main(name: str, folder: Path) -> None:
    """Write the checkpoint NAME into FOLDER."""
    make_checkpoint(name, folder)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
