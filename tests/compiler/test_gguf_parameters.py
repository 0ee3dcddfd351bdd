"""The parameters that GGUF files give are those of the checkpoints they were written from, dequantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.reference import checkpoint_logits, gguf_network
from moec.errors import CheckpointError
from tests.support.agreement import reference
from tests.support.gguf_files import write_gguf
from tests.support.tiny_models import save


@pytest.mark.parametrize(
    ("name", "kind", "split_latents"),
    [
        ("deepseek_v2", "Q4_0", True),
        ("deepseek_v2_lite", "BF16", False),
        ("deepseek_v3", "Q8_0", True),
        ("gpt_oss", "MXFP4", True),
        ("mixtral", "F16", True),
        ("mixtral", "Q5_1", True),
        ("qwen3_moe", "Q4_1", True),
    ],
)
def test_parameters(name: str, kind: str, split_latents: bool, tmp_path: Path) -> None:
    """Names, experts in one tensor, rows in rotary order, latents in two parts, gate and up apart: bit for bit."""
    save(name, tmp_path / "model", dtype=torch.float32)
    written = write_gguf(
        tmp_path / "model", tmp_path / "gguf", GGMLQuantizationType[kind], split_latents=split_latents
    )
    checkpoint = open_checkpoint(written.file)
    assert {entry.dtype for entry in checkpoint.index.values()} == {"F32", kind}
    found = gguf_network(checkpoint, torch.float32).state_dict()
    expected = reference(written.plain).state_dict()
    assert found.keys() == expected.keys()
    for parameter, value in expected.items():
        torch.testing.assert_close(found[parameter], value, rtol=0, atol=0, msg=parameter)


def test_a_file_without_a_tensor_is_refused(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "model", dtype=torch.float32)
    written = write_gguf(tmp_path / "model", tmp_path / "gguf", GGMLQuantizationType.Q8_0)
    checkpoint = open_checkpoint(written.file)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    del checkpoint.index[name]
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        next(checkpoint_logits(checkpoint, [[1, 2]], "float32"))
