"""Quantized checkpoints pack as the dequantized ones do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.packing import pack
from tests.support.packing_records import meta_model, raw, records
from tests.support.quantized_checkpoints import widen_gpt_oss, write_checkpoint
from tests.support.tiny_models import save

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

CONSTANTS = {"table": torch.zeros(3)}
FP8 = {"quant_method": "fp8", "weight_block_size": [48, 40], "fmt": "e4m3"}
MXFP4 = {"quant_method": "mxfp4"}


def packed(folder: Path, output: Path) -> dict[str, bytes]:
    """The bytes of every file of experts and of every dense tensor (their order follows the checkpoint's)."""
    checkpoint = open_checkpoint(folder)
    model, packing = records(meta_model(checkpoint.config, torch.bfloat16), checkpoint.config)
    result = pack(checkpoint, model, packing, CONSTANTS, output)
    dense, *experts = [output / file.path for file in result.files]
    tensors = {name: raw(value) for name, value in load_file(dense).items() if "moec.padding" not in name}
    return tensors | {file.name: file.read_bytes() for file in experts}


def test_fp8_deepseek_v3_with_its_mtp_layer(tmp_path: Path) -> None:
    save("deepseek_v3", tmp_path / "model", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    quantized: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if name.endswith("proj.weight"):
            grid = torch.rand(-(-value.shape[0] // 48), -(-value.shape[1] // 40)) + 0.5
            full = grid.repeat_interleave(48, 0).repeat_interleave(40, 1)[: value.shape[0], : value.shape[1]]
            quantized[name] = (value.float() / full).to(torch.float8_e4m3fn)
            quantized[f"{name}_scale_inv"] = grid
            plain[name] = (quantized[name].float() * full).bfloat16()
        else:
            quantized[name] = plain[name] = value
    quantized["model.layers.3.eh_proj.weight"] = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    quantized["model.layers.3.eh_proj.weight_scale_inv"] = torch.ones(1, 1)
    write_checkpoint(tmp_path / "fp8", tmp_path / "model", quantized, FP8)
    write_checkpoint(tmp_path / "plain", tmp_path / "model", plain, None)
    assert packed(tmp_path / "fp8", tmp_path / "a") == packed(tmp_path / "plain", tmp_path / "b")


def test_mxfp4_gpt_oss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is transformers' own unpacking, transposition included."""
    widen_gpt_oss(monkeypatch)
    save("gpt_oss", tmp_path / "model", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    quantized: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = value.shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 128, (experts, rows, columns // 32), dtype=torch.uint8)
            quantized |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        else:
            quantized[name] = plain[name] = value
    write_checkpoint(tmp_path / "mxfp4", tmp_path / "model", quantized, MXFP4)
    write_checkpoint(tmp_path / "plain", tmp_path / "model", plain, None)
    assert packed(tmp_path / "mxfp4", tmp_path / "a") == packed(tmp_path / "plain", tmp_path / "b")
