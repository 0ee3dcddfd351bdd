"""Every supported type at its real size, without weights, for a CPU and a GPU: seconds, distinct segments, peak memory.

Each model and target in a process of its own. What an earlier run left in the result is kept,
so that it can be stopped and go on.

    python -m benchmarks.compile_models                      # all types: hours
    python -m benchmarks.compile_models dbrx llama4 --again
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import click
import transformers

from benchmarks.compile_large import PUBLISHED, compile_modules, write_config
from benchmarks.support.common import RESULTS, print_rows, write_result
from moec.compiler.supported import MODELS

RESULT = "compile_models"
TARGETS = ("cpu", "cuda-sm_90")
NAMES = [
    name
    for name, state in MODELS.items()
    if state.state == "supported"
    and (name in transformers.CONFIG_MAPPING or (PUBLISHED / f"{name}.json").is_file())
]

GEMMA4 = {
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "hidden_size_per_layer_input": 0,
}
FIELDS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 6144,
        "n_heads": 48,
        "n_layers": 40,
        "max_seq_len": 32768,
        "vocab_size": 100352,
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 8, "rope_theta": 500000.0},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "dots1": {
        "hidden_size": 4096,
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "deepseek_ocr2": {
        "text_config": {
            "hidden_size": 1280,
            "intermediate_size": 6848,
            "num_hidden_layers": 12,
            "num_attention_heads": 10,
            "moe_intermediate_size": 896,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense"] + ["sparse"] * 11,
        }
    },
    "gemma4": {"text_config": GEMMA4},
    "glm4v_moe": {"text_config": {"head_dim": 128}},
    "qwen3_omni_moe": {
        "enable_audio_output": False,
        "thinker_config": {
            "text_config": {
                "hidden_size": 2048,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_hidden_layers": 48,
                "vocab_size": 152064,
            }
        },
    },
    "step3p7": {
        "text_config": {
            "sliding_window": 512,
            "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 11 + ["full_attention"],
            "num_sliding_attention_heads": 96,
            "rope_theta": 5000000.0,
        }
    },
    "gemma4_text": GEMMA4,
    "lfm2_moe": {
        "num_hidden_layers": 24,
        "layer_types": [
            "full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)
        ],
    },
    "hunyuan_v1_moe": {
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "num_experts": 64,
        "moe_topk": 8,
        "vocab_size": 128167,
    },
}
"""Of published models, where the type's default config is of a model without experts, or of none."""


def checkpoint_of(name: str, folder: Path) -> Path:
    """A checkpoint without weights: the config as published, or else the default with ``FIELDS``."""
    checkpoint = folder / name
    checkpoint.mkdir()
    if (PUBLISHED / f"{name}.json").is_file():
        write_config(name, checkpoint)
        return checkpoint
    config = transformers.AutoConfig.for_model(name, **FIELDS.get(name, {}))
    text = json.dumps(config.to_dict() | {"dtype": "bfloat16"}, default=str)
    (checkpoint / "config.json").write_text(text)
    return checkpoint


def compile_one(name: str, target: str) -> dict[str, Any]:
    """One row: what was measured, or the end of what it said where it failed."""
    context = context_of(name)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint_of(name, Path(folder))
        try:
            found = compile_modules(checkpoint, Path(folder, "modules"), target, context)
        except subprocess.CalledProcessError as error:
            return {"model": name, "target": target, "error": str(error.stderr).strip()[-300:]}
    return {"model": name, **found}


def context_of(name: str) -> int | None:
    """The longest context that compiles: an indexer's selection, or the config's own."""
    text = (
        transformers.AutoConfig.for_model(name).get_text_config() if "indexer" in MODELS[name].note else None
    )
    if text is None:
        return None
    blocks = getattr(text, "index_topk_blocks", None)
    return int(text.index_topk) if blocks is None else int(blocks * text.index_block_size)


def earlier() -> list[dict[str, Any]]:
    """The rows of the result as it is."""
    path = RESULTS / f"{RESULT}.json"
    return list(json.loads(path.read_text())["rows"]) if path.is_file() else []


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--target", "targets", multiple=True, default=TARGETS, show_default=True)
@click.option("--again", is_flag=True, help="Measure again what the result has.")
def main(names: tuple[str, ...], targets: tuple[str, ...], again: bool) -> None:
    """Compile NAMES (all supported types by default) without weights."""
    rows = {(row["model"], row["target"]): row for row in earlier()}
    for name in names or NAMES:
        for target in targets:
            if again or (name, target) not in rows:
                rows[name, target] = compile_one(name, target)
                print_rows([rows[name, target]])
                write_result(RESULT, [rows[key] for key in sorted(rows)])


if __name__ == "__main__":
    main()
