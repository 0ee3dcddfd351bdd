"""The tiny models themselves: laid out like the real checkpoints, with nothing left at a value that hides it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open

from tests.support.canaries import most_slow
from tests.support.packing_records import in_chain
from tests.support.tiny_models import DERIVED, TINY, build, save

if TYPE_CHECKING:
    from pathlib import Path

EXPERT_NAMES = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "phimoe": "model.layers.0.block_sparse_moe.experts.0.w2.weight",
    "minimax_m2": "model.layers.0.block_sparse_moe.experts.0.w3.weight",
    "gpt_oss": "model.layers.0.mlp.experts.gate_up_proj",
    "granitemoe": "model.layers.0.block_sparse_moe.input_linear.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "deepseek_v3": "model.layers.1.mlp.experts.11.down_proj.weight",
}


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_experts_are_named_as_in_the_real_checkpoints(name: str, tmp_path: Path) -> None:
    with safe_open(save(name, tmp_path) / "model.safetensors", "pt") as file:
        assert EXPERT_NAMES[name] in file.keys()  # noqa: SIM118 - it is no dict


@pytest.mark.parametrize("name", most_slow(TINY))
def test_no_weight_is_constant(name: str) -> None:
    model = build(name)
    for path, tensor in model.state_dict().items():
        if path.endswith(DERIVED) or not in_chain(model, path):
            continue
        if tensor.numel() > 1:
            assert tensor.float().std() > 0.01, path
        else:
            assert tensor != tensor.round(), path


def test_seeds_make_weights() -> None:
    same, other = build("olmoe").state_dict(), build("olmoe", seed=1).state_dict()
    assert all(torch.equal(value, same[path]) for path, value in build("olmoe").state_dict().items())
    assert not torch.equal(same["lm_head.weight"], other["lm_head.weight"])
