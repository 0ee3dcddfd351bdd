"""Codes of FP8 and MXFP4 checkpoints are carried over: what they stand for is the reference's, bit for bit."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moec.artifacts.layout.experts import layout
from moec.artifacts.quantization import FormatRule
from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.checkpoint.safetensors_header import read_header
from moec.compiler.packing import pack
from moec.compiler.packing.encodings.fp8 import scale_blocks
from moec.compiler.packing.encodings.mxfp4 import carry_mxfp4, unpack_mxfp4
from moec.compiler.packing.tensors.reading import FileSource, TensorReader
from moec.compiler.packing.tensors.stored import stored_tensors
from moec.compiler.partition import PartitionedModel, partition
from moec.compiler.quantization import Kept, kept_formats, policy_named, quantize
from moec.compiler.trace import trace
from moec.errors import CheckpointError
from moec.formats import FORMATS, dequantize_rows
from tests.support.graphs import GENERATION, MAX_CONTEXT, parts
from tests.support.packed_checkpoints import gptq_checkpoint
from tests.support.quantized_checkpoints import fp8_deepseek_v3, mxfp4_gpt_oss
from tests.support.tiny_models import save

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


FP8, MXFP4 = FORMATS["fp8-e4m3"], FORMATS["mxfp4"]


def fp8(
    rows: int, columns: int, block: tuple[int, int], kind: torch.dtype = torch.float32
) -> tuple[Any, Any, Any]:
    """Random codes, scales of their blocks, and the float32 values."""
    codes = (torch.randn(rows, columns) * 40).to(torch.float8_e4m3fn)
    grid = (torch.rand(-(-rows // block[0]), -(-columns // block[1])) * 0.01 + 1e-4).to(kind)
    values = codes.float()
    scale_blocks(values, grid.float(), block, 0)
    return codes, grid, values


@pytest.mark.parametrize("block", [(128, 128), (48, 256), (300, 700), (7, 128), (128, 1024)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_rows(
    block: tuple[int, int], kind: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks at the right and lower edge are smaller; rows come in pieces."""
    monkeypatch.setattr("moec.compiler.packing.tensors.reading.PIECE_BYTES", 40_000)
    codes, grid, values = fp8(300, 700, block, kind)
    path = tmp_path / "model.safetensors"
    save_file({"w": codes, "w_scale_inv": grid}, path)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    stored = stored_tensors(read_header(path), config)["w"]
    assert stored.format == "fp8-e4m3"
    pieces = [piece.numpy().copy() for piece in TensorReader(FileSource()).pieces(stored, 0, 300, FP8)]
    assert len(pieces) > 1 or block[0] >= 300
    np.testing.assert_array_equal(dequantize_rows(FP8, np.concatenate(pieces), 700), values.numpy())


def test_mxfp4_rows() -> None:
    """Every byte, in codes and in scales."""
    blocks = torch.arange(384).to(torch.uint8).view(3, 8, 16)
    scales = torch.randint(0, 250, (3, 8), dtype=torch.uint8)
    scales[0, :3] = torch.tensor([0, 1, 255])
    found = dequantize_rows(MXFP4, carry_mxfp4(MXFP4, blocks, scales).numpy(), 256)
    np.testing.assert_array_equal(found, unpack_mxfp4(blocks, scales).numpy())


def test_blocks_that_end_within_128_columns_have_no_format(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    codes, grid, _ = fp8(64, 300, (64, 64))
    save_file({"w": codes, "w_scale_inv": grid}, path)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}
    assert stored_tensors(read_header(path), config)["w"].format is None


def packed(folder: Path, output: Path, model: PartitionedModel) -> tuple[PartitionedModel, dict[str, Any]]:
    """A checkpoint packed as it keeps what it has, and the bytes of every file and tensor."""
    checkpoint = open_checkpoint(folder)
    model = replace(model, packing=replace(model.packing, config_sha256=checkpoint.config_sha256))
    kept = quantize(model, policy_named("keep"), kept_formats(checkpoint, model).formats)
    result = pack(checkpoint, kept.model, kept.packing, kept.constants, output)
    dense, *experts = [output / file.path for file in result.files]
    return kept, load_file(dense) | {path.name: np.fromfile(path, np.uint8) for path in experts}


def expert_part(
    model: PartitionedModel, files: dict[str, Any], layer: int, expert: int, name: str
) -> NDArray[Any]:
    """What a matrix of an expert stands for."""
    record = model.model.experts[layer]
    body = next(body for body in model.model.bodies if body.name == record.body)
    assert body.format is not None
    part = layout(body).part(name)
    data = files[f"experts-{layer:05d}.bin"].reshape(record.experts, -1)[expert]
    rows = data[part.offset_bytes :][: part.size_bytes].reshape(part.shape)
    return dequantize_rows(FORMATS[body.format], rows, body.intermediate if name == "down" else body.hidden)


def test_fp8_deepseek_v3(tmp_path: Path) -> None:
    made = fp8_deepseek_v3(tmp_path)
    folder, values = made.folder, made.values
    model, files = packed(folder, tmp_path / "out", parts("deepseek_v3", "bfloat16"))
    kept = [tensor for tensor in model.packing.dense if tensor.format is not None]
    assert {tensor.format for tensor in kept} == {"fp8-e4m3"}
    names = {tensor.name for tensor in kept}
    assert {name for name in names if "self_attn.o_proj" in name}
    assert {name for name in names if "shared_experts" in name}
    assert not {name for name in names if "kv_b_proj" in name or "embed" in name or "lm_head" in name}
    for tensor in kept:
        found = dequantize_rows(FP8, files[tensor.name].numpy(), tensor.shape[1])
        np.testing.assert_array_equal(found, values[tensor.sources[0]].numpy())
    for layer in model.model.experts:
        for expert in range(layer.experts):
            for part in ("gate", "up", "down"):
                expected = values[f"{layer.module}.{expert}.{part}_proj.weight"]
                found = expert_part(model, files, layer.layer, expert, part)
                np.testing.assert_array_equal(found, expected.numpy())


def test_mxfp4_gpt_oss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up alternate in the checkpoint, and its matrices are input-major once unpacked."""
    made = mxfp4_gpt_oss(tmp_path, monkeypatch)
    folder, values = made.folder, made.values
    config = open_checkpoint(folder).config
    traced = trace(config, dtype="bfloat16", max_context=MAX_CONTEXT)
    chain = partition(traced, generation=GENERATION, config_sha256="0" * 64)
    model, files = packed(folder, tmp_path / "out", chain)
    assert {body.format for body in model.model.bodies} == {"mxfp4"}
    assert {tensor.format for tensor in model.packing.dense} == {None}
    for layer in model.model.experts:
        both, down = (values[f"{layer.module}.{name}"] for name in ("gate_up_proj", "down_proj"))
        for expert in range(layer.experts):
            expected = {"gate": both[expert].mT[::2], "up": both[expert].mT[1::2], "down": down[expert].mT}
            for part, wanted in expected.items():
                found = expert_part(model, files, layer.layer, expert, part)
                np.testing.assert_array_equal(found, wanted.numpy())


def test_rules_go_before_what_is_kept(tmp_path: Path) -> None:
    model = parts("mixtral", "bfloat16")
    down = model.packing.experts[0].down
    policy = replace(
        policy_named("keep"), rules=(FormatRule("*.1.*", "int4"), FormatRule("*q_proj*", "keep"))
    )
    names = [tensor.name for tensor in model.packing.dense if "q_proj" in tensor.name]
    found = quantize(model, policy, {down: "fp8-e4m3", names[0]: "fp8-e4m3"})
    formats = {layer.layer: layer.body for layer in found.model.experts}
    bodies = {body.name: body.format for body in found.model.bodies}
    assert [bodies[formats[layer]] for layer in sorted(formats)] == ["fp8-e4m3", "int4-g32"]
    dense = {tensor.name: tensor.format for tensor in found.packing.dense}
    assert [dense[name] for name in names] == ["fp8-e4m3", "int4-g32"]


def test_a_folder_without_weights_is_refused_where_it_matters(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    plain = open_checkpoint(folder)
    assert kept_formats(plain, parts("mixtral")) == Kept()
    quantized = replace(plain, config=plain.config | {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(CheckpointError, match="o weights"):
        kept_formats(quantized, parts("mixtral"))


def test_what_cannot_be_carried_over_is_counted(tmp_path: Path) -> None:
    made = gptq_checkpoint(tmp_path, "mixtral", reordered=True)
    model = parts("mixtral", "bfloat16")
    found = kept_formats(open_checkpoint(made.folder), model)
    assert found.formats == {}
    assert list(found.obstacles.values()) == [len(made.values)]
    assert "desc_act" in next(iter(found.obstacles))


def test_a_bias_without_a_parameter_is_left_out_if_it_is_zero(tmp_path: Path) -> None:
    """GPTQ's packers give every product one."""
    made = gptq_checkpoint(tmp_path, "mixtral")
    checkpoint = open_checkpoint(made.folder)
    assert kept_formats(checkpoint, parts("mixtral", "bfloat16")).formats
    tensors = load_file(made.folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".w2.bias"))
    tensors[name][3] = 0.5
    save_file(tensors, made.folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"unexpected in the checkpoint: {name}")):
        kept_formats(open_checkpoint(made.folder), parts("mixtral", "bfloat16"))
