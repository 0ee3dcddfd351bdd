"""Weights are packed in a format as the reference makes them from what transformers loads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moec.artifacts.quantization import Quantization
from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.packing import PackResult, pack
from moec.compiler.packing.output import Silent
from moec.errors import BundleError, CheckpointError
from moec.formats import FORMATS, pack_rows
from moec.formats.nearest import round_to_nearest
from tests.support.packing_records import expected_expert, meta_model, records
from tests.support.tiny_models import save

if TYPE_CHECKING:
    from pathlib import Path

    from moec.artifacts.model import ModelRecord
    from moec.artifacts.packing import PackingRecord
    from moec.compiler.packing import Progress

CONSTANTS = {"table": torch.zeros(3)}
NEAREST = Quantization("test", "nearest", {}, ())


def quantized(
    folder: Path, name: str, policy: Quantization | None = NEAREST
) -> tuple[ModelRecord, PackingRecord]:
    config = open_checkpoint(folder).config
    model, packing = records(meta_model(config, torch.bfloat16), config)
    bodies = tuple(replace(body, format=name) for body in model.bodies)
    return replace(model, bodies=bodies), replace(packing, quantization=policy)


def run(
    folder: Path,
    output: Path,
    name: str,
    progress: Progress | None = None,
    policy: Quantization | None = NEAREST,
) -> PackResult:
    return pack(
        open_checkpoint(folder),
        *quantized(folder, name, policy),
        CONSTANTS,
        output,
        progress=progress,
        workers=2,
    )


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("mixtral", "int4-g32"),
        ("mixtral", "int8-g128"),
        ("gpt_oss", "int4-g64-z"),
        ("gpt_oss", "mxfp4"),
        ("granitemoe", "fp8-e4m3"),
    ],
)
def test_experts_are_those_of_the_reference(
    model_type: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in pieces of some rows: gate and up of an expert, apart, fused, transposed and interleaved."""
    monkeypatch.setattr("moec.compiler.packing.tensors.reading.PIECE_BYTES", 2_000)
    folder = save(model_type, tmp_path / "model", dtype=torch.bfloat16)
    model, packing = quantized(folder, name)
    run(folder, tmp_path / "out", name)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for source, layer in zip(packing.experts, model.experts, strict=True):
        data = (tmp_path / f"out/weights/experts-{layer.layer:05d}.bin").read_bytes()
        stride = len(data) // layer.experts
        for expert in range(layer.experts):
            wanted = expected_expert(reference, model, source, expert)
            assert data[expert * stride : (expert + 1) * stride] == wanted, (layer.layer, expert)


def test_dense_tensors_are_those_of_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix as it is, in pieces, and one that a recipe makes; both are quantized from what the checkpoint has."""
    monkeypatch.setattr("moec.compiler.packing.tensors.reading.PIECE_BYTES", 2_000)
    folder = save("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    config = open_checkpoint(folder).config
    model, packing = records(meta_model(config, torch.bfloat16), config)
    turned = next(tensor for tensor in packing.dense if tensor.steps)
    formats = {"lm_head.weight": "int8-g32", turned.name: "int4-g32-z"}
    dense = tuple(replace(tensor, format=formats.get(tensor.name)) for tensor in packing.dense)
    packing = replace(packing, dense=dense, quantization=NEAREST)
    pack(open_checkpoint(folder), model, packing, CONSTANTS, tmp_path / "out")
    stored = load_file(tmp_path / "out/weights/dense.safetensors")
    source = load_file(folder / "model.safetensors")
    values = {"lm_head.weight": source["lm_head.weight"], turned.name: source[turned.sources[0]].mT}
    for name, kind in formats.items():
        expected = pack_rows(FORMATS[kind], round_to_nearest(FORMATS[kind], values[name].float().numpy()))
        assert stored[name].dtype == torch.uint8
        np.testing.assert_array_equal(stored[name].numpy(), expected)


class StopAfter(Silent):
    def __init__(self, limit_bytes: int) -> None:
        self.left = limit_bytes

    def advance(self, size_bytes: int) -> None:
        self.left -= size_bytes
        if self.left < 0:
            raise InterruptedError


def test_a_stopped_packing_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.compiler.packing.output.SAVE_BYTES", 10_000)
    folder = save("mixtral", tmp_path / "model")
    files = run(folder, tmp_path / "whole", "int4-g32").files
    with pytest.raises(InterruptedError):
        run(folder, tmp_path / "out", "int4-g32", StopAfter(sum(file.size_bytes for file in files) // 2))
    assert run(folder, tmp_path / "out", "int4-g32").files == files
    other = run(folder, tmp_path / "out", "int8-g128").files
    assert [file.sha256 for file in other[1:]] != [file.sha256 for file in files[1:]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if ".experts." in name)
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="experts") as caught:
        run(folder, tmp_path / "out", "int4-g32")
    assert "--quantization" in caught.value.do


@pytest.mark.parametrize("policy", [None, replace(NEAREST, method="magic")])
def test_records_without_a_known_method_are_refused(policy: Quantization | None, tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path / "model")
    with pytest.raises(BundleError, match="int4-g32"):
        run(folder, tmp_path / "out", "int4-g32", policy=policy)
    assert not (tmp_path / "out").exists()
