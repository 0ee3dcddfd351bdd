"""Attention of GPUs that is not causal, or whose scores depend on distances, and the dropping of tokens, emulated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moec.artifacts.model import ExpertsLayer
from moec.artifacts.program import HOPPER
from moec.compiler.kernels import reference
from moec.compiler.kernels.cuda.attention import append_kernel, attention, has_hopper, workspace
from moec.compiler.kernels.cuda.experts.capacity import capacity
from moec.runtime.tensors import aligned_empty
from tests.support.capacities import CAPACITIES, drawn_choices
from tests.support.cuda_emulator import Emulated
from tests.support.source_attention import SPECS, SourceCase

EXACT, ROUNDED = 4e-6, 3e-3
"""Largest error, relative to the largest result: of few tokens and of float32, and of 16-bit products."""

LENGTHS = (75, 1, 33, 40)
QUERIES = {"many": (20, 1, 3, 17), "few": (2, 1, 1, 3)}
CANARIES = [("t5 encoder", "many"), ("t5 decoder", "few"), ("cross", "few")]
CASES = [
    (name, count)
    for name, spec in SPECS.items()
    for count in (QUERIES if spec.causal or spec.cross else ("many",))
]


def most_slow(cases: list[tuple[str, str]]) -> list[Any]:
    return [case if case in CANARIES else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def run(kernel: Any, name: str, tensors: list[torch.Tensor], *, extra: NDArray[Any] | None = None) -> None:
    """Run an emulated kernel on copies that lie as GPUs want them, and copy back what it wrote."""
    copies = [aligned_empty(tuple(tensor.shape), str(tensor.dtype).split(".")[1]) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy[...] = tensor.numpy()
    operands: list[NDArray[Any]] = [*copies[:-1], extra, copies[-1]] if extra is not None else copies
    Emulated(kernel)(name, *operands)
    for copy, tensor in zip(copies, tensors, strict=True):
        tensor.copy_(torch.from_numpy(np.asarray(copy)))


@pytest.mark.parametrize(("name", "count"), most_slow(CASES))
def test_matches_the_reference(name: str, count: str) -> None:
    spec = SPECS[name]
    case = SourceCase(spec, LENGTHS, QUERIES[count] if spec.causal or spec.cross else None)
    if spec.cross:
        run(append_kernel(spec), f"append_{spec.name}", case.append_arguments())
        case.check_cache()
    fixed, each = workspace(spec)
    size = fixed + each * len(case.rows)
    memory = aligned_empty((size,), "uint8") if size else None
    if memory is not None:
        memory[...] = 255  # floats that are NaN
    run(attention(spec), f"attention_{spec.name}", case.arguments(), extra=memory)
    exact = spec.dtype == "float32" or count == "few"
    assert case.error() < (EXACT if exact else ROUNDED)
    case.check_cache()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5 decoder", "cross"])
def test_blocks_share_a_long_source(name: str) -> None:
    spec = SPECS[name]
    case = SourceCase(spec, (620, 40), (2, 1))
    memory = aligned_empty((workspace(spec)[0],), "uint8")
    memory[...] = 255
    run(attention(spec), f"attention_{spec.name}", case.arguments(), extra=memory)
    assert case.error() < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if has_hopper(spec)])
def test_hopper_matches_the_reference(name: str) -> None:
    spec = SPECS[name]
    case = SourceCase(spec, LENGTHS, QUERIES["many"] if spec.cross else None)
    memory = aligned_empty((workspace(spec)[0],), "uint8")
    run(attention(spec, hopper=True), f"attention_{spec.name}{HOPPER}", case.arguments(), extra=memory)
    assert case.error() < ROUNDED
    case.check_cache()


@pytest.mark.parametrize("layer", CAPACITIES)
def test_choices_beyond_the_capacity_lose_their_weight(layer: ExpertsLayer) -> None:
    calls = np.array([0] * 20 + [20] * 9 + [29, 30, 31], np.int32)
    index, weight = drawn_choices(layer, len(calls))
    out = torch.zeros(weight.shape)
    run(capacity("drop", layer), "drop", [index, weight, torch.from_numpy(calls), out])
    expected = reference.keep_within_capacity(layer, index.numpy(), weight.double().numpy(), calls.tolist())
    np.testing.assert_array_equal(out.numpy(), expected.astype(np.float32))
    assert (expected[:20] == 0).sum() >= 5
    assert (expected[29:] > 0).all()
