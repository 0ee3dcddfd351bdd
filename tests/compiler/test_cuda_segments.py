"""Every segment's CUDA program, run in the emulator, against the CPU's program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from numpy.typing import NDArray

from moec.artifacts.program import SegmentProgram
from moec.compiler.lowering.lower import export_cpu, import_segments, packed_functions
from moec.compiler.lowering.pipeline import pipeline, run_passes
from moec.compiler.lowering.program import read_segment
from moec.compiler.lowering.targets import parse_target
from moec.runtime.tensors import aligned_empty, tensor_at
from tests.support.canaries import most_slow
from tests.support.cuda_emulator import Emulated
from tests.support.graphs import parts
from tests.support.tiny_models import TINY

TOLERANCE = 5e-5
"""Relative to the largest element: products of few tokens have 16 bits of mantissa, and enter other products."""
STORAGE: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}


@dataclass(frozen=True)
class Lowered:
    segments: dict[str, SegmentProgram]
    functions: Any


def _lower(model: Any, target: str) -> Lowered:
    module = run_passes(import_segments(model.functions, model.model), pipeline(parse_target(target)), None)
    inputs = {function.name: len(function.inputs) for function in model.model.functions}
    segments = {
        name: read_segment(name, module[name], inputs[name], model.model.class_name)
        for name in model.functions
    }
    return Lowered(segments, packed_functions(module, tuple(segments.values()), {}))


def _size(shape: tuple[int | str, ...], tokens: int) -> tuple[int, ...]:
    return tuple(
        extent if isinstance(extent, int) else int(extent.removesuffix("T") or 1) * tokens for extent in shape
    )


def _random(spec: Any, tokens: int, vocabulary: int, random: np.random.Generator) -> NDArray[Any]:
    shape = _size(spec.shape, tokens)
    array = aligned_empty(shape, STORAGE[spec.dtype])
    if spec.dtype == "int64":
        array[...] = random.integers(0, vocabulary, shape)
    elif spec.dtype == "bfloat16":
        array[...] = (random.standard_normal(shape) * 0.3).astype(np.float32).view(np.uint32) >> 16
    else:
        array[...] = random.standard_normal(shape)
    return array


def _run(
    segment: SegmentProgram, call: Any, inputs: list[Any], weights: list[Any], outputs: Any, tokens: int
) -> list[Any]:
    def unwritten(spec: Any) -> NDArray[Any]:
        array = aligned_empty(_size(spec.shape, tokens), STORAGE[spec.dtype])
        array.view(np.uint8)[...] = 0x7F
        return array

    pools = {
        "input": inputs,
        "weight": weights,
        "output": [unwritten(spec) for spec in outputs],
        "local": [unwritten(spec) for spec in segment.locals],
    }
    for step in segment.calls:
        operands = [
            (pools[item.source][item.number].reshape(_size(item.shape, tokens)), item.dtype)
            for item in step.operands
        ]
        call(step.function, operands)
    return [pools[item.source][item.number] for item in segment.outputs]


@pytest.mark.parametrize("name", most_slow(sorted(TINY)))
def test_every_segment_computes_what_the_cpu_computes(name: str, tmp_path: Path) -> None:
    model = parts(name, "bfloat16")
    cpu, gpu = _lower(model, "cpu"), _lower(model, "cuda-sm_80")
    library = tvm_ffi.load_module(str(tmp_path / export_cpu(cpu.functions, parse_target("cpu"), tmp_path)[0]))
    emulated = Emulated(*(function for _, function in gpu.functions.functions_items()))

    def on_cpu(function: str, operands: list[Any]) -> None:
        library[function](*(tensor_at(array.ctypes.data, dtype, array.shape) for array, dtype in operands))

    for tokens in (1, 5):
        for spec in model.model.functions:
            random = np.random.default_rng(tokens)
            inputs = [_random(item, tokens, model.model.vocab_size, random) for item in spec.inputs]
            weights = [_random(item, tokens, model.model.vocab_size, random) for item in spec.weights]
            both = [
                _run(lowered.segments[spec.name], call, inputs, weights, spec.outputs, tokens)
                for lowered, call in (
                    (cpu, on_cpu),
                    (gpu, lambda function, operands: emulated(function, *operands)),
                )
            ]
            for expected, actual in zip(*both, strict=True):
                scale = np.abs(expected).max()
                error = np.abs(expected - actual.reshape(expected.shape)).max()
                assert error <= TOLERANCE * scale, f"{spec.name}, {tokens} tokens"
