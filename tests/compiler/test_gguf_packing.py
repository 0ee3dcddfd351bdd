"""A GGUF file is packed as any checkpoint is: each byte read once, and going on where it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

from moec.compiler.checkpoint import Checkpoint, open_checkpoint
from moec.compiler.packing import pack
from moec.compiler.partition import PartitionedModel, partition
from moec.compiler.quantization import kept_formats, policy_named, quantize
from moec.compiler.trace import trace
from moec.formats import FORMATS, dequantize_rows
from tests.compiler.test_packing_resume import CountingSource, InterruptedHere, StopAfter, contents
from tests.support.gguf_files import write_gguf
from tests.support.graphs import GENERATION, MAX_CONTEXT
from tests.support.tiny_models import save


@pytest.fixture(scope="module")
def packed_plan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, PartitionedModel, Path]:
    """A checkpoint in blocks, its chain as it keeps them, and the folder of its dequantized weights."""
    root = tmp_path_factory.mktemp("gguf")
    save("qwen3_moe", root / "model", dtype=torch.float32)
    written = write_gguf(root / "model", root / "gguf", GGMLQuantizationType.Q4_1)
    checkpoint = open_checkpoint(written.file)
    traced = trace(checkpoint.config, dtype="bfloat16", max_context=MAX_CONTEXT)
    parts = partition(traced, generation=GENERATION, config_sha256=checkpoint.config_sha256)
    kept = quantize(parts, policy_named("keep"), kept_formats(checkpoint, parts).formats)
    return checkpoint, kept, written.plain


def test_every_byte_is_read_once_and_codes_are_kept(
    packed_plan: tuple[Checkpoint, PartitionedModel, Path], tmp_path: Path
) -> None:
    checkpoint, parts, plain = packed_plan
    source = CountingSource()
    pack(checkpoint, parts.model, parts.packing, parts.constants, tmp_path, source=source)
    assert source.size_bytes == sum(entry.size_bytes for entry in checkpoint.index.values())
    dense, meant = (
        load_file(tmp_path / "weights" / "dense.safetensors"),
        load_file(plain / "model.safetensors"),
    )
    kept = [tensor for tensor in parts.packing.dense if tensor.format is not None]
    assert {tensor.format for tensor in kept} == {"int4-g32-m"}
    for tensor in kept:
        found = dequantize_rows(FORMATS["int4-g32-m"], dense[tensor.name].numpy(), tensor.shape[1])
        assert (found == meant[tensor.sources[0]].numpy()).all(), tensor.name
    assert {body.format for body in parts.model.bodies} == {"int4-g32-m"}


def test_packing_goes_on_where_it_was_stopped(
    packed_plan: tuple[Checkpoint, PartitionedModel, Path], tmp_path: Path
) -> None:
    checkpoint, parts, _ = packed_plan
    arguments = (checkpoint, parts.model, parts.packing, parts.constants)
    pack(*arguments, tmp_path / "whole")
    with pytest.raises(InterruptedHere):
        pack(*arguments, tmp_path / "stopped", progress=StopAfter(100_000), workers=1)
    source = CountingSource()
    pack(*arguments, tmp_path / "stopped", source=source, workers=1)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert source.size_bytes < sum(entry.size_bytes for entry in checkpoint.index.values())
