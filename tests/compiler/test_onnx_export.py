"""The ONNX files under onnxruntime, as an independent check of the compiled modules."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from moec.artifacts.model import ExpertBody, TensorSpec
from moec.compiler.lowering.lower import lower
from moec.compiler.lowering.targets import parse_target
from moec.compiler.onnx_export import ExpertModule, expert_inputs, export_onnx
from moec.compiler.partition import PartitionedModel, partition
from moec.compiler.trace import trace
from tests.support.segments import GENERATION, Module
from tests.support.tiny_models import TINY


@dataclass(frozen=True)
class Exported:
    parts: PartitionedModel
    onnx: Path
    module: Path


@pytest.fixture(scope="module", params=["deepseek_v3"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = trace(TINY[request.param]().to_dict(), dtype="float32", max_context=64)
    parts = partition(traced, generation=GENERATION, config_sha256="0" * 64)
    folder, output = tmp_path_factory.mktemp("onnx") / "deep" / "folder", tmp_path_factory.mktemp("module")
    export_onnx(parts, folder)
    lower(parts.model, parts.functions, parse_target("cpu"), output)
    return Exported(parts, folder, output / "model.so")


def test_one_checked_file_for_each_segment_and_expert(exported: Exported) -> None:
    names = {f"{spec.name}.onnx" for spec in exported.parts.model.functions}
    names |= {f"expert_{body.name}.onnx" for body in exported.parts.model.bodies}
    assert {path.name for path in exported.onnx.iterdir()} == names
    for path in exported.onnx.iterdir():
        onnx.checker.check_model(onnx.load(path), full_check=True)


def test_tokens_are_the_dynamic_dimension(exported: Exported) -> None:
    first = onnx.load(exported.onnx / f"{exported.parts.model.functions[0].name}.onnx").graph.input[0]
    assert [dimension.dim_param or dimension.dim_value for dimension in first.type.tensor_type.shape.dim] == [
        1,
        "T",
    ]


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_segments_agree_with_the_compiled_module(exported: Exported, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    module = Module(exported.module)
    for spec in exported.parts.model.functions:
        arguments = [_random(value, tokens, generator) for value in (*spec.inputs, *spec.weights)]
        found = module(spec.name, *arguments)
        expected = _run(exported.onnx / f"{spec.name}.onnx", arguments)
        for value, reference in zip(found, expected, strict=True):
            _compare(value, reference)


@pytest.mark.parametrize("tokens", [1, 9])
def test_experts_agree_with_torch(exported: Exported, tokens: int) -> None:
    (body,) = exported.parts.model.bodies
    _check_expert(body, exported.onnx / f"expert_{body.name}.onnx", tokens)


def _check_expert(body: ExpertBody, path: Path, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    arguments = [_random(spec, tokens, generator) for _, spec in expert_inputs(body)]
    _compare(_run(path, arguments)[0], ExpertModule(body)(*arguments).numpy())


def _random(spec: TensorSpec, tokens: int, generator: torch.Generator) -> torch.Tensor:
    shape = [tokens if extent == "T" else int(extent) for extent in spec.shape]
    if spec.dtype == "int64":
        return torch.randint(0, 4, shape, generator=generator)
    return torch.randn(shape, generator=generator) * 0.5


def _run(path: Path, arguments: list[torch.Tensor]) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path))
    names = [value.name for value in session.get_inputs()]
    assert len(names) == len(arguments)
    return list(
        session.run(None, {name: value.numpy() for name, value in zip(names, arguments, strict=True)})
    )


def _compare(found: Any, expected: Any) -> None:
    if found.dtype == np.int64:
        np.testing.assert_array_equal(np.sort(found, -1), np.sort(expected, -1))
    else:
        scale = max(float(np.abs(expected).max()), 1.0)
        np.testing.assert_allclose(np.sort(found, -1), np.sort(expected, -1), rtol=1e-5, atol=1e-5 * scale)
