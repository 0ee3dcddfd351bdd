"""The interfaces one by one: masks, attention arguments, activations, patches, rotary tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import masking_utils
from transformers.activations import ACT2FN

from moec.artifacts.activation import check_expression
from moec.compiler.activation import activate
from moec.compiler.tracing import markers
from moec.compiler.tracing.activation import read_activation
from moec.compiler.tracing.attention import check_arguments
from moec.compiler.tracing.experts import read_experts
from moec.compiler.tracing.masks import MaskSpec, describe_mask
from moec.compiler.tracing.model.build import build_config, build_model, expert_modules
from moec.compiler.tracing.model.foreign_experts import adopt_experts
from moec.compiler.tracing.model.rope import fix_rotary_tables
from moec.compiler.tracing.patches import PATCHES, patched
from moec.errors import UnsupportedModelError
from tests.support.canaries import most_slow
from tests.support.tiny_models import TINY, build


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (masking_utils.causal_mask_function, MaskSpec()),
        (masking_utils.sliding_window_causal_mask_function(8), MaskSpec(window=8)),
        (masking_utils.chunked_causal_mask_function(16, torch.zeros(1)), MaskSpec(chunk=16)),
    ],
)
def test_known_masks(function: Any, expected: MaskSpec) -> None:
    assert describe_mask(function, "SomeModel") == expected


@pytest.mark.parametrize(
    "function",
    [
        masking_utils.sliding_window_overlay(8),
        masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function),
        masking_utils.and_masks(masking_utils.causal_mask_function, lambda *_: True),
        masking_utils.padding_mask_function(torch.ones(1, 1)),
    ],
)
def test_unknown_masks_name_the_model(function: Any) -> None:
    with pytest.raises(
        UnsupportedModelError, match="SomeModel uses an attention mask that moec does not know"
    ):
        describe_mask(function, "SomeModel")


@pytest.mark.parametrize(
    "arguments",
    [
        {"dropout": 0.0, "sliding_window": 4, "s_aux": torch.ones(2), "position_ids": torch.ones(1)},
        {"position_bias": None, "is_causal": True},
    ],
)
def test_known_attention_arguments(arguments: dict[str, Any]) -> None:
    check_arguments("SomeModel", arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dropped_heads": torch.ones(1)}, "dropped_heads=Tensor"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"is_causal": False}, "is_causal=False"),
    ],
)
def test_unknown_attention_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"SomeModel .*{named}"):
        check_arguments("SomeModel", arguments)


@pytest.mark.parametrize("name", most_slow(TINY))
def test_activation_equals_the_models_own(name: str) -> None:
    model = build(name)
    adopt_experts(model)
    path, module = next(iter(expert_modules(model).items()))
    facts = read_experts(path, module)
    check_expression(facts.activation)
    up = torch.randn(5, 2 * facts.intermediate, generator=torch.Generator().manual_seed(0)) * 6
    gate, value = (up[:, ::2], up[:, 1::2]) if facts.interleaved else up.chunk(2, -1)
    expected = module._apply_gate(up) if facts.gated else module.act_fn(value)
    ours = activate(facts.activation, {"gate": gate, "up": value} if facts.gated else {"up": value})
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "silu", "sigmoid", "tanh"]
)
def test_activations_without_a_gate(name: str) -> None:
    function = ACT2FN[name]
    expression = read_activation(function, False, False, "SomeExperts")
    check_expression(expression)
    up = torch.linspace(-4, 4, 33)[None]
    torch.testing.assert_close(activate(expression, {"up": up}), function(up), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: torch.softmax(x, -1), "uses aten._softmax.default"),
        (lambda x: x[:, 1:] * x[:, :-1], "splits gate and up differently"),
        (lambda x: x * 2, "does not tell gate from up"),
        (lambda x: x[:, ::2] * x[:, 1::2], "splits gate and up differently"),
    ],
)
def test_activations_that_no_kernel_has(function: Any, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"SomeExperts cannot be compiled.*{why}"):
        read_activation(function, True, False, "SomeExperts")


def test_every_patch_finds_its_target() -> None:
    for patch in PATCHES:
        with patched(patch.module):
            owner: Any = __import__(patch.module, fromlist=["_"])
            for part in patch.target.split("."):
                owner = getattr(owner, part)
            assert owner is patch.replacement


def test_rotary_tables_are_settled_for_the_context() -> None:
    raw = {**TINY["mixtral"]().to_dict(), "head_dim": 8}
    raw["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 2.0,
        "original_max_position_embeddings": 128,
    }
    tables = []
    for context in (128, 129):
        model = build_model(build_config(raw), torch.float32)
        tables.append(fix_rotary_tables(model, context)["model.rotary_emb.inv_freq"])
    torch.testing.assert_close(tables[0] / tables[1], torch.tensor([2.0, 3.0, 4.0, 5.0]))


def test_linear_accumulates_in_float32() -> None:
    x = torch.full((1, 4099), 1.0)
    weight = torch.full((2, 4099), 1.0, dtype=torch.bfloat16)
    assert markers.linear(x, weight).tolist() == [[4099.0, 4099.0]]
    assert markers.linear(x, weight, torch.tensor([0.5, 0.25])).tolist() == [[4099.5, 4099.25]]
