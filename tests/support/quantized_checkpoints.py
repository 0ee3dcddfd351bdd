"""Tiny checkpoints as DeepSeek-V3 and gpt-oss are published: FP8 with a scale a block, MXFP4."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moec.compiler.packing.encodings.fp8 import scale_blocks
from moec.formats import FORMATS
from moec.formats.nearest import round_to_nearest
from tests.support.fp8 import fp8_blocks
from tests.support.tiny_models import TINY, save

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from transformers import PretrainedConfig

Tensors = dict[str, torch.Tensor]

BLOCK = (24, 128)
"""Rows are ragged; as wide as any matrix of the tiny model."""


@dataclass(frozen=True)
class Published:
    """A quantized checkpoint, and what it means."""

    folder: Path
    plain: Path
    """The same model with float32 values instead of codes."""
    values: Tensors
    """Those of the quantized tensors, by name."""


def fp8_deepseek_v3(folder: Path) -> Published:
    """All products but head and router are FP8."""
    save("deepseek_v3", folder / "model", dtype=torch.bfloat16)
    tensors, stored, values = load_file(folder / "model" / "model.safetensors"), Tensors(), Tensors()
    for name, value in tensors.items():
        stored[name] = value
        if name.endswith("proj.weight") or "kv_a_proj_with_mqa" in name:
            codes, scales = fp8_blocks(value, BLOCK)
            stored[name], stored[f"{name}_scale_inv"], values[name] = codes, scales, codes.float()
            scale_blocks(values[name], scales, BLOCK, 0)
    quantization = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "fmt": "e4m3"}
    return write_pair(folder, tensors, stored, values, quantization)


def mxfp4_gpt_oss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    """All routed experts are MXFP4, with values as transformers unpacks them."""

    widen_gpt_oss(monkeypatch)
    save("gpt_oss", folder / "model", dtype=torch.bfloat16)
    tensors, stored, values = load_file(folder / "model" / "model.safetensors"), Tensors(), Tensors()
    for name, value in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = value.shape
            quantized = round_to_nearest(FORMATS["mxfp4"], value.mT.float().reshape(-1, columns).numpy())
            pairs = torch.from_numpy(quantized.codes).view(experts, rows, columns // 32, 16, 2)
            blocks = pairs[..., 0] | pairs[..., 1] << 4
            scales = torch.from_numpy(quantized.scales).view(experts, rows, columns // 32)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            values[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        else:
            stored[name] = value
    return write_pair(folder, tensors, stored, values, {"quant_method": "mxfp4"})


def widen_gpt_oss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny gpt-oss have experts as wide as two blocks of MXFP4."""

    def config() -> PretrainedConfig:
        made = original()
        made.intermediate_size = 64
        return made

    original = TINY["gpt_oss"]
    monkeypatch.setitem(TINY, "gpt_oss", config)


def write_checkpoint(folder: Path, like: Path, tensors: Tensors, quantization: object) -> None:
    """Write ``tensors`` beside the config of another checkpoint, with a ``quantization_config``."""
    folder.mkdir()
    config = json.loads((like / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    save_file(tensors, folder / "model.safetensors")


def write_pair(
    folder: Path, tensors: Tensors, stored: Tensors, values: Tensors, quantization: object
) -> Published:
    """Write ``stored`` as published, and ``tensors`` with ``values`` in place of what is quantized."""
    plain = {name: values.get(name, value).float().contiguous() for name, value in tensors.items()}
    write_checkpoint(folder / "quantized", folder / "model", stored, quantization)
    write_checkpoint(folder / "plain", folder / "model", plain, None)
    return Published(folder / "quantized", folder / "plain", values)
