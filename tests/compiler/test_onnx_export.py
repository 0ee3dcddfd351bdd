"""The ONNX files under onnxruntime, as an independent check of the compiled modules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from moec.artifacts.model import DType, TensorSpec
from moec.compiler.lowering.lower import lower
from moec.compiler.lowering.targets import parse_target
from moec.compiler.onnx_export import ExpertModule, expert_inputs, export_onnx
from moec.compiler.partition import PartitionedModel
from tests.support.canaries import most_slow
from tests.support.graphs import parts
from tests.support.segments import Module

CASES: list[tuple[str, DType]] = [("deepseek_v3", "bfloat16"), ("gpt_oss", "float16")]
ONNX_TYPES = {
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.float32: onnx.TensorProto.FLOAT,
    torch.int64: onnx.TensorProto.INT64,
}


@dataclass(frozen=True)
class Exported:
    parts: PartitionedModel
    onnx: Path
    module: Path


@pytest.fixture(scope="module", params=most_slow(CASES, CASES[1:]), ids=lambda case: "-".join(case))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = parts(*request.param)
    folder, output = tmp_path_factory.mktemp("onnx") / "deep" / "folder", tmp_path_factory.mktemp("module")
    export_onnx(model, folder)
    lower(model.model, model.functions, parse_target("cpu"), output)
    return Exported(model, folder, output)


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


def test_narrow_weights_are_cast_and_then_multiplied_in_float32(exported: Exported) -> None:
    paths = list(exported.onnx.iterdir())
    assert paths
    for path in paths:
        graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
        types = {
            value.name: value.type.tensor_type.elem_type
            for value in (*graph.input, *graph.value_info, *graph.output)
        }
        products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
        assert products
        assert {types[name] for node in products for name in node.input if name} == {onnx.TensorProto.FLOAT}
        weights = [value for value in graph.input if types[value.name] in (10, 16)]
        assert weights
        readers = {node.op_type for node in graph.node if {w.name for w in weights} & set(node.input)}
        assert readers <= {"Cast", "Gather", "Transpose"}


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_segments_agree_with_the_compiled_module(exported: Exported, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    module = Module(exported.module)
    for spec in exported.parts.model.functions:
        arguments = [_random(value, tokens, generator) for value in (*spec.inputs, *spec.weights)]
        found = module(spec.name, *arguments, inputs=len(spec.inputs))
        expected = _run(exported.onnx / f"{spec.name}.onnx", arguments)
        for value, reference in zip(found, expected, strict=True):
            _compare(value, reference)


@pytest.mark.parametrize("tokens", [1, 9])
def test_experts_agree_with_the_compiled_kernel_and_with_torch(exported: Exported, tokens: int) -> None:
    (body,) = exported.parts.model.bodies
    generator = torch.Generator().manual_seed(tokens)
    x, *weights = (_random(spec, tokens, generator) for _, spec in expert_inputs(body))
    assert {weight.dtype for weight in weights} == {getattr(torch, body.dtype)}
    reference = _run(exported.onnx / f"expert_{body.name}.onnx", [x, *weights])[0]
    _compare(Module(exported.module).experts(body, x, weights), reference)
    _compare(ExpertModule(body)(x, *weights).numpy(), reference)


def _random(spec: TensorSpec, tokens: int, generator: torch.Generator) -> torch.Tensor:
    shape = [tokens if extent == "T" else int(extent) for extent in spec.shape]
    if spec.dtype == "int64":
        return torch.randint(0, 4, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * 0.5).to(getattr(torch, spec.dtype))


def _run(path: Path, arguments: list[torch.Tensor]) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path))
    names = [value.name for value in session.get_inputs()]
    values = [_ort_value(argument) for argument in arguments]
    outputs = session.run_with_ort_values(None, dict(zip(names, values, strict=True)))
    return [output.numpy() for output in outputs]


def _ort_value(tensor: torch.Tensor) -> Any:
    """A 16-bit type goes as its bits: numpy has no bfloat16."""
    bits = tensor.view(torch.int16) if tensor.element_size() == 2 else tensor
    kind = ONNX_TYPES[tensor.dtype]
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits.contiguous().numpy(), kind)


def _compare(found: Any, expected: Any) -> None:
    if found.dtype == np.int64:
        np.testing.assert_array_equal(np.sort(found, -1), np.sort(expected, -1))
    else:
        scale = max(float(np.abs(expected).max()), 1.0)
        np.testing.assert_allclose(np.sort(found, -1), np.sort(expected, -1), rtol=1e-5, atol=1e-5 * scale)
