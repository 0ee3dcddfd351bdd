"""Dense weights get formats by their roles, and the graphs that read them compute with what those stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moec.artifacts.files.checks import model_problems
from moec.artifacts.layout.footprint import dense_weights, footprint
from moec.artifacts.quantization import FormatRule, Quantization
from moec.artifacts.steps import SegmentStep
from moec.compiler.packing.dense import plan_dense
from moec.compiler.partition import PartitionedModel, partition
from moec.compiler.quantization import policy_named, quantize
from moec.compiler.quantization.roles import weight_roles
from moec.compiler.trace import trace
from moec.formats import FORMATS, dequantize_rows, pack_rows, row_bytes
from moec.formats.nearest import round_to_nearest
from tests.support.graphs import GENERATION, MAX_CONTEXT, parts
from tests.support.tiny_models.encoder_decoders import ENCODER_DECODERS

if TYPE_CHECKING:
    from moec.artifacts.model import FunctionSpec, TensorSpec

NAMES = ("deepseek_v2", "gpt_oss", "qwen2_moe")
TOKENS = 3


@pytest.mark.parametrize("name", NAMES)
def test_roles(name: str) -> None:
    model = parts(name, "bfloat16")
    roles = weight_roles(model)
    router = "router.weight" if name == "gpt_oss" else "mlp.gate.weight"
    routers = {key for key, role in roles.items() if role == "router"}
    assert routers == {key for key in roles if router in key}
    assert len(routers) == len(model.model.experts)
    assert [key for key, role in roles.items() if role == "embedding"] == ["model.embed_tokens.weight"]
    assert [key for key, role in roles.items() if role == "head"] == ["lm_head.weight"]
    linear = {key for key, role in roles.items() if role == "linear"}
    assert {key for key in linear if "o_proj" in key}
    assert not {key for key in linear if "norm" in key or "kv_b_proj" in key}


def test_a_tied_embedding_is_the_head() -> None:
    roles = weight_roles(parts("granitemoe", "bfloat16"))
    tied = [key for key, role in roles.items() if role in ("embedding", "head")]
    assert [roles[key] for key in tied] == ["head"]


def quantized(name: str, policy: Quantization) -> PartitionedModel:
    found = quantize(parts(name, "bfloat16"), policy)
    assert list(model_problems(found.model)) == []
    assert list(found.functions) == [function.name for function in found.model.functions]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_formats_are_in_every_record(name: str) -> None:
    plain, found = parts(name, "bfloat16"), quantized(name, policy_named("int4"))
    roles = weight_roles(plain)
    specs = dense_weights(found.model)
    for tensor in found.packing.dense:
        wanted = (
            "int8-g128" if roles.get(tensor.name, "router") != "router" and min(tensor.shape) >= 32 else None
        )
        assert tensor.format == wanted
        if tensor.name in specs:
            assert specs[tensor.name] == tensor.spec
    assert {body.format for body in found.model.bodies} == {"int4-g32"}
    sizes = {placed.tensor.name: placed.end - placed.begin for placed in _placed(found)}
    head = next(tensor for tensor in found.packing.dense if tensor.name == "lm_head.weight")
    assert sizes["lm_head.weight"] == head.shape[0] * row_bytes(FORMATS["int8-g128"], head.shape[1])
    assert found.packing.parameter_dtypes["lm_head.weight"] == "float32"
    assert footprint(found.model).dense_bytes < footprint(plain.model).dense_bytes


def _placed(model: PartitionedModel) -> list[Any]:
    return [placed for group in plan_dense(model.packing.dense, lambda _: ()).groups for placed in group]


def test_equal_functions_with_weights_in_different_formats_are_several() -> None:
    plain = parts("mixtral", "bfloat16")
    policy = replace(policy_named("int4"), rules=(FormatRule("model.layers.1.self_attn.o_proj.*", "plain"),))
    found = quantized("mixtral", policy)
    assert len(found.functions) == len(plain.functions) + 1
    assert len(quantized("mixtral", policy_named("int4")).functions) == len(plain.functions)
    assert len(quantized("mixtral", Quantization("p", "nearest", {}, ())).functions) == len(plain.functions)


def test_an_encoder_is_quantized_as_well() -> None:
    config = ENCODER_DECODERS["switch_transformers"]().to_dict()
    traced = trace(config, dtype="float32", max_context=MAX_CONTEXT)
    plain = partition(traced, generation=GENERATION, config_sha256="0" * 64)
    found = quantize(plain, policy_named("int4"))
    assert list(model_problems(found.model)) == []
    formats = {spec.name: {weight.format for weight in spec.weights} for spec in found.model.functions}
    encoder = {step.function for step in found.model.encoder if isinstance(step, SegmentStep)}
    assert any("int8-g128" in formats[name] for name in encoder)
    assert len(found.model.encoder) == len(plain.model.encoder)


def test_small_matrices_stay_plain() -> None:
    """Routers of tiny models, here asked for."""
    plain = parts("deepseek_v3", "bfloat16")
    policy = Quantization("p", "nearest", {"router": "int8"}, ())
    assert quantize(plain, policy).model.functions == plain.model.functions


@pytest.mark.parametrize("name", NAMES)
def test_graphs_compute_with_what_codes_stand_for(name: str) -> None:
    plain, found = parts(name, "bfloat16"), quantized(name, policy_named("int4-g32-z"))
    generator = torch.Generator().manual_seed(0)
    for before, spec in zip(plain.model.functions, found.model.functions, strict=True):
        inputs = [_random(item, generator, plain.model.vocab_size) for item in before.inputs]
        weights = [_random(item, generator, plain.model.vocab_size) for item in before.weights]
        stored, stands_for = _quantized(spec, weights)
        expected = plain.functions[before.name].graph_module(*inputs, *stands_for)
        actual = found.functions[spec.name].graph_module(*inputs, *stored)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def _random(spec: TensorSpec, generator: torch.Generator, vocabulary: int) -> torch.Tensor:
    shape = [TOKENS if extent == "T" else extent for extent in spec.shape]
    if spec.dtype == "int64":
        return torch.randint(0, vocabulary, shape, generator=generator)
    return torch.randn(shape, generator=generator).to(getattr(torch, spec.dtype))


def _quantized(
    spec: FunctionSpec, weights: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    stored, stands_for = [], []
    for item, weight in zip(spec.weights, weights, strict=True):
        if item.format is None:
            stored.append(weight)
            stands_for.append(weight)
            continue
        kind = FORMATS[item.format]
        rows = pack_rows(kind, round_to_nearest(kind, weight.float().numpy()))
        assert rows.shape == item.stored.shape
        stored.append(torch.from_numpy(rows))
        # A copy is aligned as the graph's own are: where sums begin may depend on it.
        stands_for.append(torch.from_numpy(dequantize_rows(kind, rows, weight.shape[1])).clone())
    return stored, stands_for
