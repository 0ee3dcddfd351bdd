"""Every kind of model: tensors too many or too few, or of another config, are named before any byte is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file

from moec.errors import CheckpointError
from tests.support.compiling import compile_checkpoint
from tests.support.tiny_models import save
from tests.support.tiny_models.deepseek_fp8 import save_as_published

Tensors: TypeAlias = dict[str, torch.Tensor]
Edit: TypeAlias = Callable[[Tensors], Any]
Change: TypeAlias = dict[str, Any]


def without(name: str) -> Edit:
    return lambda tensors: tensors.pop(name)


def adding(name: str) -> Edit:
    return lambda tensors: tensors.update({name: torch.zeros(2)})


EXPERT = "encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight"
BIAS = "model.decoder.layers.1.ffn.experts.expert_2.fc1.bias"
GROK = "model.layers.1.moe_block.experts.2.linear_v.weight"
LANGUAGE = "model.language_model.layers"
SCALE = "model.layers.1.self_attn.o_proj.weight_scale_inv"

TENSORS: list[tuple[str, Edit, str]] = [
    ("switch_transformers", without(EXPERT), f"missing .*{EXPERT}"),
    ("switch_transformers", adding("encoder.adapter.weight"), r"unexpected .*encoder\.adapter\.weight"),
    ("nllb_moe", without(BIAS), f"missing .*{BIAS}"),
    ("grok-1", without(GROK), f"missing .*{GROK}"),
    ("arctic", adding("model.layers.0.adapter.weight"), r"unexpected .*model\.layers\.0\.adapter\.weight"),
    ("qwen3_vl_moe", without(f"{LANGUAGE}.0.self_attn.k_proj.weight"), r"missing .*0\.self_attn\.k_proj"),
    ("qwen3_vl_moe", adding(f"{LANGUAGE}.0.adapter.weight"), r"unexpected .*0\.adapter\.weight"),
    ("qwen3_next", without("model.layers.0.linear_attn.A_log"), r"missing .*linear_attn\.A_log"),
    ("qwen3_next", adding("model.layers.0.linear_attn.extra"), r"unexpected .*linear_attn\.extra"),
    ("deepseek_v3_fp8", without(SCALE), f"{SCALE} is missing"),
    (
        "deepseek_v3_fp8",
        adding("model.layers.1.mlp.experts.0.adapter.weight"),
        r"unexpected .*adapter\.weight",
    ),
]
"""Name of a tiny model, what is done to its tensors, and what the error says."""

CONFIGS: list[tuple[str, Change, str]] = [
    ("switch_transformers", {"num_layers": 3}, r"unexpected .*encoder\.block\.3\."),
    ("switch_transformers", {"num_decoder_layers": 4}, r"missing .*decoder\.block\.3\."),
    ("switch_transformers", {"num_experts": 7}, r"missing .*experts\.expert_6\.w[io]\.weight"),
    ("switch_transformers", {"num_experts": 5}, r"unexpected .*experts\.expert_5\.w[io]\.weight"),
    ("nllb_moe", {"encoder_layers": 4}, r"missing .*encoder\.layers\.3\."),
    ("grok-1", {"num_experts": 6}, r"missing .*experts\.5\.linear"),
    ("arctic", {"num_hidden_layers": 2}, r"unexpected .*layers\.2\."),
    ("qwen3_vl_moe", {"text_config": {"num_hidden_layers": 2}}, rf"unexpected .*{LANGUAGE}\.2\."),
    ("qwen3_vl_moe", {"text_config": {"num_local_experts": 6}}, r"experts.* has the wrong shape"),
    ("qwen3_vl_moe", {"vision_config": {"depth": 1}}, r"unexpected .*visual\.blocks\.1\."),
    ("step3p7", {"text_config": {"n_routed_experts": 8}}, r"moe\..* has the wrong shape"),
    ("dbrx", {"ffn_config": {"moe_num_experts": 6}}, r"experts.* has the wrong shape"),
    ("qwen3_next", {"linear_conv_kernel_dim": 3}, r"conv1d\.weight has the wrong shape"),
    ("deepseek_v3_fp8", {"num_hidden_layers": 2}, r"unexpected .*model\.layers\.2\."),
    ("deepseek_v3_fp8", {"moe_intermediate_size": 64}, "has the wrong shape"),
    ("deepseek_v3_fp8", {"quantization_config": {"weight_block_size": [64, 64]}}, "do not fit it"),
]
"""Name of a tiny model, what is changed in its config, and what the error says."""


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    if request.param == "deepseek_v3_fp8":
        published, _ = save_as_published(save("deepseek_v3", folder / "model"), folder)
        return published
    return save(request.param, folder / "model")


def refused(folder: Path, output: Path, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        compile_checkpoint(folder, output)
    assert not output.exists()
    assert sorted(path.name for path in output.parent.iterdir()) == [folder.name]


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint", "edit", "named"), TENSORS, indirect=["checkpoint"])
def test_tensors_too_many_or_too_few_are_named(
    checkpoint: Path, edit: Edit, named: str, tmp_path: Path
) -> None:
    wrong = tmp_path / "model"
    wrong.mkdir()
    tensors: Tensors = {}
    for file in checkpoint.glob("*.safetensors"):
        tensors |= load_file(file)
    edit(tensors)
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    (wrong / "config.json").symlink_to(checkpoint / "config.json")
    refused(wrong, tmp_path / "out.moec", named)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint", "change", "named"), CONFIGS, indirect=["checkpoint"])
def test_a_config_of_another_model_is_found(
    checkpoint: Path, change: Change, named: str, tmp_path: Path
) -> None:
    wrong = tmp_path / "model"
    wrong.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(merged(config, change)))
    for file in checkpoint.glob("model*"):
        (wrong / file.name).symlink_to(file)
    refused(wrong, tmp_path / "out.moec", named)


def merged(config: dict[str, Any], change: Change) -> dict[str, Any]:
    """``config`` with the keys of ``change``, and of objects in it, in their places."""
    return config | {
        key: merged(config[key], value) if isinstance(value, dict) else value for key, value in change.items()
    }
