"""Every segment's CUDA program, run in the emulator, against the CPU's program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from numpy.typing import NDArray

from moec.artifacts.program import HOPPER, SegmentProgram
from moec.compiler.lowering.lower import export_cpu
from moec.compiler.lowering.targets import parse_target
from moec.compiler.quantization import policy_named, quantize
from moec.formats import FORMATS, pack_rows
from moec.formats.nearest import round_to_nearest
from moec.runtime.tensors import aligned_empty, tensor_at
from tests.kernels.test_quantized import SHORT_TOLERANCE
from tests.support.canaries import most_slow
from tests.support.cuda_emulator import Emulated
from tests.support.graphs import parts
from tests.support.lowered import STORAGE, lower_segments, run_segment, sized
from tests.support.tiny_models import TINY

ROUNDED = 1e-2
"""The same where activations are rounded to bfloat16."""
TOLERANCE = 5e-5
"""Relative to the largest element: products of few tokens have 16 bits of mantissa, and enter other products."""


def _random(spec: Any, tokens: int, vocabulary: int, random: np.random.Generator) -> NDArray[Any]:
    shape = sized(spec.shape, tokens)
    if spec.format is not None:
        kind = FORMATS[spec.format]
        values = (random.standard_normal(shape) * 0.3).astype(np.float32)
        packed = pack_rows(kind, round_to_nearest(kind, values))
        array = aligned_empty(packed.shape, np.uint8)
        array[...] = packed
        return array
    array = aligned_empty(shape, STORAGE[spec.dtype])
    if spec.dtype == "int64":
        array[...] = random.integers(0, vocabulary, shape)
    elif spec.dtype == "bfloat16":
        array[...] = (random.standard_normal(shape) * 0.3).astype(np.float32).view(np.uint32) >> 16
    else:
        array[...] = random.standard_normal(shape)
    return array


@pytest.mark.parametrize("name", most_slow(sorted(TINY), ("deepseek_v2_lite",)))
def test_every_segment_computes_what_the_cpu_computes(name: str, tmp_path: Path) -> None:
    compare(parts(name, "bfloat16"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v2_lite", "deepseek_v3", "qwen2_moe"])
def test_products_of_two_types_share_a_launch(name: str, tmp_path: Path) -> None:
    """A router of 16 bits, and the first product of a quantized shared expert, for which the CPU rounds activations."""
    model = quantize(parts(name, "bfloat16"), policy_named("int4"))
    compare(model, tmp_path, SHORT_TOLERANCE)


def compare(model: Any, folder: Path, tolerance: float = TOLERANCE) -> None:
    """Every segment, by the CPU's kernels and the GPU's."""
    both = Both(model, "cuda-sm_80", folder)
    emulated = Emulated(*both.kernels.values())
    for tokens in (1, 5):
        for spec in model.model.functions:
            for expected, actual in both.results(spec, tokens, emulated):
                scale = np.abs(expected).max()
                error = np.abs(expected - actual).max()
                assert error <= tolerance * scale, f"{spec.name}, {tokens} tokens"


class Both:
    """A model's segments for the CPU, and for a GPU that the emulator stands for."""

    def __init__(self, model: Any, target: str, folder: Path) -> None:
        self.model = model.model
        self._cpu = lower_segments(model.functions, model.model, "cpu")
        self.gpu = lower_segments(model.functions, model.model, target)
        (path, *_) = export_cpu(self._cpu.functions, parse_target("cpu"), folder)
        self._library = tvm_ffi.load_module(str(folder / path))
        self.kernels = {
            str(variable.name_hint): function for variable, function in self.gpu.functions.functions_items()
        }

    def results(
        self, spec: Any, tokens: int, emulated: Callable[..., None]
    ) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Of each output of a segment with random inputs and weights: the CPU's and the GPU's."""
        random = np.random.default_rng(tokens)
        inputs, weights = (
            [_random(item, tokens, self.model.vocab_size, random) for item in items]
            for items in (spec.inputs, spec.weights)
        )
        expected, actual = (
            run_segment(lowered.segments[spec.name], call, inputs, weights, spec.outputs, tokens)
            for lowered, call in (
                (self._cpu, self._on_cpu),
                (self.gpu, lambda name, given: emulated(name, *given)),
            )
        )
        for one, other in zip(expected, actual, strict=True):
            yield one, other.reshape(one.shape)

    def _on_cpu(self, function: str, operands: list[Any]) -> None:
        tensors = (tensor_at(array.ctypes.data, dtype, array.shape) for array, dtype in operands)
        self._library[function](*tensors)


def _passed_on(segment: SegmentProgram) -> bool:
    """Whether one kernel's rounded results are another one's input."""
    users = Counter(
        operand.number
        for call in segment.calls
        for operand in call.operands
        if (operand.source, operand.dtype) == ("local", "bfloat16")
    )
    return any(count > 1 for count in users.values())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    model = parts("deepseek_v2_lite", "bfloat16")
    return Both(model, "cuda-sm_90", tmp_path_factory.mktemp("both"))


@pytest.mark.parametrize("hopper", [False, True], ids=["any GPU", "Hopper"])
def test_many_tokens_compute_what_the_cpu_computes(hopper: bool, both: Both) -> None:
    """Gated products write what the next one multiplies. (Routers may choose other experts.)"""
    specs = [
        spec for spec in both.model.functions if all(output.dtype == "float32" for output in spec.outputs)
    ]
    segments = [both.gpu.segments[spec.name] for spec in specs]
    assert any(map(_passed_on, segments))
    called = {call.function for segment in segments for call in segment.calls}
    names = {name: name + HOPPER if hopper and name + HOPPER in both.kernels else name for name in called}
    emulated = Emulated(*(both.kernels[name] for name in names.values()))
    for spec in specs:
        for expected, actual in both.results(spec, 20, lambda name, *given: emulated(names[name], *given)):
            error = np.abs(expected - actual).max()
            assert error <= ROUNDED * np.abs(expected).max(), spec.name
