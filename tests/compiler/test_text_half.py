"""The language model of models that see or hear as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.packing.tensors.binding import bind
from moec.compiler.packing.tensors.check import check_names
from moec.compiler.packing.tensors.stored import stored_tensors
from moec.compiler.tracing.model.build import build_config, build_model, expert_modules
from moec.compiler.tracing.model.text_half import TEXT_HALVES, placeholders
from moec.errors import CheckpointError
from tests.support.graphs import parts
from tests.support.tiny_models import TINY, save

if TYPE_CHECKING:
    from pathlib import Path


def test_each_is_tested_and_names_a_class_of_transformers() -> None:
    for name, half in TEXT_HALVES.items():
        assert name in TINY
        assert name in CONFIG_MAPPING
        assert hasattr(transformers, half.model)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "ernie4_5_vl_moe"])
def test_towers_are_left_out_and_listed(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(name, tmp_path))
    model = build_model(build_config(checkpoint.config), torch.float32)
    half = TEXT_HALVES[name]
    needed = [path for path, _ in model.named_parameters() if half.has(path) and "vision_moe" not in path]
    bindings = bind(model, stored_tensors(checkpoint.index, checkpoint.config))
    found, extras = check_names(model, bindings, needed)
    assert sorted(found) == sorted(needed)
    seen = {stored.name for binding in found.values() for stored in binding.stored_tensors}
    assert sorted({*extras, *seen}) == sorted(checkpoint.index)
    assert not seen & set(extras)
    assert any("vision" in extra or "visual" in extra for extra in extras)
    assert all(half.has(path) for path in expert_modules(model))


def test_what_the_language_model_needs_may_not_be_missing(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save("qwen3_vl_moe", tmp_path))
    index = {name: entry for name, entry in checkpoint.index.items() if "layers.1.mlp.up_proj" not in name}
    model = build_model(build_config(checkpoint.config), torch.float32)
    needed = [path for path, _ in model.named_parameters() if TEXT_HALVES["qwen3_vl_moe"].has(path)]
    with pytest.raises(CheckpointError, match=r"missing .*layers\.1\.mlp\.up_proj\.weight"):
        check_names(model, bind(model, stored_tensors(index, checkpoint.config)), needed)


def test_tokens_that_stand_for_other_inputs_are_known() -> None:
    found = {name: placeholders(CONFIG_MAPPING[name]()) for name in TEXT_HALVES}
    assert found["llama4"] == {"image": 200092}
    assert found["qwen3_omni_moe"] == {"image": 151655, "video": 151656, "audio": 151646}
    assert all("image" in kinds for name, kinds in found.items() if name != "mistral4")
    assert placeholders(CONFIG_MAPPING["mixtral"]()) == {}


@pytest.mark.slow
def test_bundles_say_which_they_are() -> None:
    assert parts("qwen3_vl_moe").model.placeholders == {"image": 220, "video": 221}
