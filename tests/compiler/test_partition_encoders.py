"""How an encoder-decoder model falls into two chains."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest

from moec.artifacts.files.checks import model_problems
from moec.artifacts.layout.cache import cache_layers
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.model import ModelRecord
from moec.artifacts.steps import AppendStep, AttentionStep, CapacityStep, ExpertsStep, SegmentStep
from moec.compiler.generation import generation_defaults
from moec.compiler.partition import PartitionedModel, partition
from moec.compiler.trace import trace
from moec.errors import UnsupportedModelError
from tests.support.tiny_models.encoder_decoders import ENCODER_DECODERS


@cache
def parts(name: str) -> PartitionedModel:
    config = ENCODER_DECODERS[name]().to_dict()
    traced = trace(config, dtype="float32", max_context=128)
    return partition(traced, generation=generation_defaults(config, None), config_sha256="0" * 64)


def record() -> ModelRecord:
    return parts("switch_transformers").model


def test_records_are_consistent() -> None:
    model = record()
    assert list(model_problems(model)) == []
    assert (len(model.experts), [layer.capacity for layer in model.experts]) == (3, [9, 9, 9])
    assert model.experts[0].module.startswith("encoder")
    assert model.generation.decoder_start_token_id == 0


def test_each_cross_attention_has_keys_appended_in_a_stage_of_its_own() -> None:
    model = record()
    tail = model.encoder[-6:]
    assert [type(step) for step in tail] == [SegmentStep, AppendStep] * 3
    assert len({step.function for step in tail if isinstance(step, SegmentStep)}) == 1
    appended = [step.layer for step in tail if isinstance(step, AppendStep)]
    specs = {spec.name: spec for spec in model.attentions}
    own = [s.layer for s in model.steps if isinstance(s, AttentionStep) and specs[s.attention].causal]
    crossed = [s.layer for s in model.steps if isinstance(s, AttentionStep) and specs[s.attention].cross]
    assert appended == own == crossed == [0, 1, 2]
    assert len(cache_layers(model)) == 3


def test_encoder_and_decoder_share_functions() -> None:
    model = record()
    encoder, decoder = (
        {step.function for step in steps if isinstance(step, SegmentStep)}
        for steps in (model.encoder, model.steps)
    )
    assert len(encoder & decoder) >= 3
    assert len(model.bodies) == 1


def test_tokens_are_dropped_between_router_and_experts() -> None:
    for steps in (record().encoder, record().steps):
        assert any(isinstance(step, CapacityStep) for step in steps)
        for step, following in pairwise(steps):
            if isinstance(step, CapacityStep):
                assert isinstance(following, ExpertsStep)
                assert (following.layer, following.index, following.weight) == (
                    step.layer,
                    step.index,
                    step.output,
                )


def test_activations_are_those_of_the_larger_chain() -> None:
    """Not those of all layers' keys and values at once."""
    model = record()
    whole = footprint(model).activation_bytes_per_token
    assert footprint(replace(model, encoder=model.encoder[:-6])).activation_bytes_per_token <= whole
    assert whole < 3 * footprint(replace(model, encoder=())).activation_bytes_per_token


def test_what_does_not_fit_together_is_named() -> None:
    model = record()
    lost = replace(model, encoder=model.encoder[:-1])
    assert any("writes no keys for attention layer 2" in problem for problem in model_problems(lost))
    append = model.encoder[-1]
    assert isinstance(append, AppendStep)
    moved = replace(model, encoder=(*model.encoder[:-1], replace(append, attention="attention_0")))
    assert any("which does so itself" in problem for problem in model_problems(moved))
    narrow = replace(model.attentions[-1], key_dim=8)
    other = replace(model, attentions=(*model.attentions[:-1], narrow))
    assert any("caches of several forms" in problem for problem in model_problems(other))
    free = replace(model, experts=tuple(replace(layer, capacity=0) for layer in model.experts))
    assert any("has no capacity" in problem for problem in model_problems(free))


@pytest.mark.parametrize(
    "changes",
    [
        {"second_expert_policy": "random"},
        {"moe_eval_capacity_token_fraction": 0.5, "batch_prioritized_routing": True},
    ],
)
def test_routing_that_draws_or_sorts_is_refused(changes: dict[str, object]) -> None:
    config = ENCODER_DECODERS["nllb_moe"]().to_dict() | changes
    with pytest.raises(UnsupportedModelError, match="This NLLB-MoE"):
        trace(config, dtype="float32", max_context=128)
