"""Architectures of our own: configs as the hub has them, names of tensors, what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moec.compiler.architectures import ARCHITECTURES
from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.packing.tensors.binding import Renamed, Stacked, bind
from moec.compiler.packing.tensors.stored import stored_tensors
from moec.compiler.reference import reference_logits
from moec.compiler.tracing.model.build import build_config, build_model
from moec.errors import CheckpointError, UnsupportedModelError
from tests.support.tiny_models import save
from tests.support.tiny_models.own import ARCTIC, GROK, OWN


@pytest.mark.parametrize("name", OWN)
def test_every_tensor_of_the_published_layout_has_its_parameter(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(name, tmp_path, shard="100KB"))
    model = build_model(build_config(checkpoint.config), torch.float32)
    bindings = bind(model, stored_tensors(checkpoint.index, checkpoint.config))
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    assert set(bindings.parameters) == set(model.state_dict()) - tied
    assert (bindings.unexpected, bindings.repeated) == ((), ())
    experts = {path for path in bindings.parameters if path.endswith(("gate_up_proj", "down_proj"))}
    for path, binding in bindings.parameters.items():
        assert isinstance(binding, Stacked if path in experts else Renamed), path


def test_gate_comes_before_up(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save("grok-1", tmp_path))
    model = build_model(build_config(checkpoint.config), torch.float32)
    bindings = bind(model, stored_tensors(checkpoint.index, checkpoint.config))
    binding = bindings.parameters["model.layers.0.moe_block.experts.gate_up_proj"]
    assert isinstance(binding, Stacked)
    assert [group[0].name.rsplit(".", 2)[1] for group in binding.groups] == ["linear", "linear_v"]


def test_what_a_config_leaves_out_is_the_release() -> None:
    config = build_config({"model_type": "grok-1", "num_experts": 8})
    assert config.num_local_experts == 8
    assert config.max_attn_value == 30.0
    assert config.tie_word_embeddings
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert build_config(ARCTIC).rope_parameters["rope_theta"] == 10000


@pytest.mark.parametrize("change", [{"num_experts": "eight"}, {"hidden_act": "snake"}])
def test_a_config_that_describes_no_model(change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="does not describe a grok-1 model"):
        build_model(build_config(GROK | change), torch.float32)


def test_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    for name in ARCHITECTURES:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
        with pytest.raises(UnsupportedModelError, match=f"transformers has no {name} model"):
            next(reference_logits(tmp_path, [[1]], "float32"))
