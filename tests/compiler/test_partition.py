"""Chains of every model, run by torch against transformers, and the shape of the chains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from moec.artifacts.files.codec import from_json, to_json
from moec.artifacts.model import LatentHeads, ModelRecord
from moec.artifacts.packing import PackingRecord
from moec.artifacts.steps import AttentionStep, ExpertsStep, SegmentStep, StateStep
from moec.compiler.tracing.model.text_half import from_tokens
from tests.support.canaries import most_slow
from tests.support.chain import Sequence, TorchChain
from tests.support.graphs import parts, traced
from tests.support.packing_records import in_chain
from tests.support.tiny_models import TINY, build

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT, NEW = 40, 6


def tokens(count: int, seed: int) -> list[int]:
    drawn: list[int] = torch.randint(2, 120, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn


@torch.no_grad()
def reference(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    logits: torch.Tensor = from_tokens(model)(torch.tensor([ids])).logits[0]
    return logits


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


def check(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Logits that differ by rounding: transformers advances states in chunks, with products and differences."""
    error = relative_error(ours, theirs)
    assert error < (5e-5 if parts(name).model.states else 3e-6) or error < 3 * last_bits(name)


@torch.no_grad()
def last_bits(name: str) -> float:
    """What becomes of a change in the last bit of every weight."""
    ids, plain, changed = tokens(PROMPT, 3), build(name), build(name)
    generator = torch.Generator().manual_seed(0)
    for parameter in changed.parameters():
        parameter.mul_(1 + 2.0**-23 * torch.randn(parameter.shape, generator=generator))
    return relative_error(reference(changed, ids), reference(plain, ids))


@pytest.mark.parametrize("name", most_slow(TINY))
@torch.no_grad()
def test_logits_are_those_of_transformers(name: str) -> None:
    """A prompt, then steps in which a second sequence joins; each logit against one whole forward."""
    model = build(name)
    first, second = tokens(PROMPT + NEW, 1), tokens(11 + NEW, 2)
    chain = TorchChain(parts(name), model)
    one, two = Sequence(), Sequence()
    got_one = [chain.step([(one, first[:PROMPT])])]
    got_two: list[torch.Tensor] = []
    for step in range(NEW):
        fed = second[:11] if step == 1 else second[9 + step : 10 + step]
        batch = [(one, first[PROMPT + step : PROMPT + step + 1])] + ([(two, fed)] if step else [])
        logits = chain.step(batch)
        got_one.append(logits[:1])
        got_two.append(logits[1:])
    ours = torch.cat(got_two)
    check(name, torch.cat(got_one), reference(model, first))
    check(name, ours, reference(model, second)[: len(ours)])


def rounded(name: str) -> PreTrainedModel:
    """A model that computes in float32, with weights that bfloat16 has."""
    model = build(name)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model


@pytest.mark.parametrize("name", most_slow(TINY))
@torch.no_grad()
def test_narrow_weights_cost_only_their_own_rounding(name: str) -> None:
    model, ids = rounded(name), tokens(PROMPT, 3)
    chain, one = TorchChain(parts(name, "bfloat16"), model, exact_cache=True), Sequence()
    got = torch.cat([chain.step([(one, ids[:-3])]), chain.step([(one, ids[-3:])])])
    assert got.dtype == torch.float32
    check(name, got, reference(model, ids))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@torch.no_grad()
def test_a_narrow_cache_stays_near_transformers(name: str) -> None:
    model, ids = rounded(name), tokens(PROMPT, 3)
    got = TorchChain(parts(name, "bfloat16"), model).step([(Sequence(), ids)])
    expected = reference(model, ids)
    assert relative_error(got, expected) > 1e-5
    near = torch.nn.functional.cosine_similarity(got, expected, dim=-1) > 0.999
    assert near.sum() >= PROMPT - 1, "at most one token is routed otherwise"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_last_steps_need_only_the_wanted_rows(name: str) -> None:
    chain = TorchChain(parts(name), build(name))
    ids = tokens(20, 4)
    whole = chain.step([(Sequence(), ids)])
    few = chain.step([(Sequence(), ids)], rows=[3, 19])
    torch.testing.assert_close(few, whole[[3, 19]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", most_slow(TINY))
def test_chain_is_well_formed(name: str) -> None:
    model, packing = parts(name).model, parts(name).packing
    made = {"tokens", "positions"}
    specs = {function.name: function for function in model.functions}
    weights = {item.name: item for item in packing.dense}
    for step in model.steps:
        if isinstance(step, SegmentStep):
            spec = specs[step.function]
            assert set(step.inputs) <= made
            assert [model.values[value] for value in step.inputs] == list(spec.inputs)
            assert [model.values[value] for value in step.outputs] == list(spec.outputs)
            assert [(weights[w].dtype, weights[w].shape) for w in step.weights] == [
                (item.dtype, item.shape) for item in spec.weights
            ]
            made |= set(step.outputs)
        else:
            assert isinstance(step, AttentionStep | ExpertsStep | StateStep)
            made.add(step.output)
    assert "logits" in made
    assert all(isinstance(step, SegmentStep) for step in model.steps[model.last_step :])
    assert not isinstance(model.steps[model.last_step - 1], SegmentStep)
    assert list(parts(name).functions) == [function.name for function in model.functions]
    sources = {source for item in packing.dense for source in item.sources}
    assert {s.removeprefix("constant:") for s in sources if s.startswith("constant:")} == set(
        parts(name).constants
    )
    assert {s for s in sources if not s.startswith("constant:")} <= set(packing.parameter_dtypes)


@pytest.mark.parametrize("name", most_slow(TINY))
def test_every_parameter_is_packed(name: str) -> None:
    """Nothing of the model is lost, and nothing but the model is asked for."""
    model = build(name)
    expected = {path for path, _ in model.named_parameters() if in_chain(model, path)}
    used = set(parts(name).packing.parameter_dtypes)
    state = set(model.state_dict())
    assert expected <= used <= state


@pytest.mark.parametrize("name", most_slow(TINY))
def test_matrices_keep_their_type_and_all_else_is_widened(name: str) -> None:
    partitioned = parts(name, "bfloat16")
    packing, model = partitioned.packing, partitioned.model
    stored = traced(name, "bfloat16").stored
    dimensions = {path: value.dim() for path, value in build(name).state_dict().items()}
    of_experts = {
        source
        for experts in packing.experts
        for source in (experts.up, experts.down, experts.up_bias, experts.down_bias)
        if source is not None
    }
    taken = {name for step in model.steps if isinstance(step, StateStep) for name in step.weights}
    of_states = {source for item in packing.dense if item.name in taken for source in item.sources}
    for path, dtype in packing.parameter_dtypes.items():
        matrix = dimensions[path] > 1 and path not in of_states and not path.endswith("A_log")
        narrow = stored[path] == torch.bfloat16 and (path in of_experts or matrix)
        assert dtype == ("bfloat16" if narrow else "float32"), path
    for item in packing.dense:
        assert item.dtype == packing.parameter_dtypes.get(item.sources[0], "float32"), item.name
    assert {value.dtype for value in model.values.values()} <= {"float32", "int64"}
    assert {body.dtype for body in model.bodies} == {"bfloat16"}
    assert {spec.dtype for spec in model.attentions} == {"float16"}


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_records_survive_json(name: str) -> None:
    assert from_json(ModelRecord, to_json(parts(name).model)) == parts(name).model
    assert from_json(PackingRecord, to_json(parts(name).packing)) == parts(name).packing


def test_equal_layers_share_their_segments() -> None:
    model = parts("qwen3_moe").model
    kinds = [
        step.function
        if isinstance(step, SegmentStep)
        else "attention"
        if isinstance(step, AttentionStep)
        else "experts"
        for step in model.steps
    ]
    layer = ["attention", "segment_1", "experts"]
    assert kinds == ["segment_0", *layer, "segment_2", *layer, "segment_2", *layer, "segment_3"]
    assert len(model.attentions) == len(model.bodies) == 1


def test_shared_experts_are_side_segments() -> None:
    model = parts("deepseek_v3").model
    for number, step in enumerate(model.steps):
        if isinstance(step, ExpertsStep):
            before = model.steps[number - 1]
            assert isinstance(before, SegmentStep)
            assert before.side
            assert len(before.weights) == 1, "its first product is made with the router's"
    assert sum(isinstance(step, SegmentStep) and step.side for step in model.steps) == 2


def test_windows_and_sinks_are_in_the_attentions() -> None:
    windows = [spec.window for spec in parts("gpt_oss").model.attentions]
    assert windows == [8, 0]
    assert all(spec.sinks for spec in parts("gpt_oss").model.attentions)
    assert [spec.window for spec in parts("mixtral").model.attentions] == [24]


def test_latent_weights_are_made_when_packing() -> None:
    found = parts("deepseek_v2", "bfloat16")
    derived = {item.name: item for item in found.packing.dense if item.steps}
    step = next(step for step in found.model.steps if isinstance(step, AttentionStep))
    assert step.weights is not None
    absorb, expand, value = (
        derived[name] for name in (step.weights.absorb, step.weights.expand, step.weights.value)
    )
    assert absorb.shape == (4, 32, 16)  # heads, rank, nope: products contract over the last
    assert expand.shape == (4, 16, 32)
    assert value.shape == (4, 12, 32)
    for item in (absorb, expand, value):
        assert item.sources == ("model.layers.0.self_attn.kv_b_proj.weight",)
        assert item.dtype == "bfloat16"
    (spec,) = found.model.attentions
    assert spec.heads == LatentHeads(16, 12, "bfloat16")
    assert (spec.query_dim, spec.result_dim, spec.key_dim) == (24, 12, 40)


def test_tied_embeddings_are_one_tensor() -> None:
    model, packing = parts("qwen3_moe").model, parts("qwen3_moe").packing
    assert not [item.name for item in packing.dense if "lm_head" in item.name]
    (last,) = model.steps[model.last_step :]
    assert isinstance(last, SegmentStep)
    assert "model.embed_tokens.weight" in last.weights


@pytest.mark.slow
def test_layers_that_differ_in_depth_alone_share_their_segments() -> None:
    """BEAM scales residuals by the number of the sublayer; its layers 1 and 3 are of one kind."""
    steps = parts("beam").model.steps
    attentions = [number for number, step in enumerate(steps) if isinstance(step, AttentionStep)]
    experts = [number for number, step in enumerate(steps) if isinstance(step, ExpertsStep)]
    between = [steps[a + 1 : e] for a, e in ((attentions[1], experts[0]), (attentions[3], experts[2]))]
    first, third = ([step.function for step in part if isinstance(step, SegmentStep)] for part in between)
    assert first
    assert first == third
