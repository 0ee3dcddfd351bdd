"""The tiny DeepSeek-V3 in the layout of the published checkpoint: FP8 in blocks with scales, an MTP layer, shards.

``deepseek-ai/DeepSeek-V3`` stores every product but the router and the head in FP8 (E4M3) with one float32 scale
(``weight_scale_inv``) a block of 128 x 128; ``kv_a_proj_with_mqa`` has 576 rows, so its last blocks are ragged. Layer
61, one past the last, predicts a second token (MTP) and has the embedding and head once more. Here blocks are 32 x 24,
so that nearly all matrices have ragged ones.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from tests.support.fp8 import fp8_blocks

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = (32, 24)

Tensors = dict[str, torch.Tensor]


def dequantized(codes: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Float32: each value times its block's scale."""
    value = codes.float()
    for row in range(value.shape[0]):
        for column in range(value.shape[1]):
            value[row, column] *= grid[row // BLOCK[0], column // BLOCK[1]]
    return value


def save_as_published(plain: Path, folder: Path, shard: str = "60KB") -> tuple[Path, Path]:
    """Write the checkpoint in ``plain`` as published, and beside it what it means in float32.

    Returns:
        The folder of the FP8 checkpoint, and that of the dequantized one without MTP layer.
    """
    config = json.loads((plain / "config.json").read_text())
    tensors = load_file(plain / "model.safetensors")
    stored: Tensors = {}
    meant: Tensors = {}
    for name, value in tensors.items():
        if name.endswith(("proj.weight", "proj_with_mqa.weight")):
            stored[name], stored[f"{name}_scale_inv"] = fp8_blocks(value, BLOCK)
            meant[name] = dequantized(stored[name], stored[f"{name}_scale_inv"])
        else:
            stored[name] = meant[name] = value
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
    }
    published = config | {"num_nextn_predict_layers": 1, "quantization_config": quantization}
    _write(folder / "fp8", stored | mtp_layer(stored, config["num_hidden_layers"]), published, shard)
    _write(folder / "plain", meant, config, "50GB")
    return folder / "fp8", folder / "plain"


def mtp_layer(stored: Tensors, layers: int) -> Tensors:
    """The layer past the last, in the published names: a whole layer, two norms, a product, embedding and head."""
    last, mtp = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    extra = {
        name.replace(last, mtp): value.clone() for name, value in stored.items() if name.startswith(last)
    }
    hidden = stored["model.norm.weight"].shape[0]
    codes, grid = fp8_blocks(torch.randn(hidden, 2 * hidden), BLOCK)
    extra |= {f"{mtp}eh_proj.weight": codes, f"{mtp}eh_proj.weight_scale_inv": grid}
    extra |= {f"{mtp}{norm}.weight": torch.ones(hidden) for norm in ("enorm", "hnorm", "shared_head.norm")}
    extra[f"{mtp}embed_tokens.weight"] = stored["model.embed_tokens.weight"].clone()
    extra[f"{mtp}shared_head.head.weight"] = stored["lm_head.weight"].clone()
    return extra


def _write(folder: Path, tensors: Tensors, config: dict[str, object], shard: str) -> None:
    folder.mkdir(parents=True)
    save_torch_state_dict(tensors, folder, max_shard_size=shard)
    (folder / "config.json").write_text(json.dumps(config))
