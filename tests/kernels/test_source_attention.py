"""Attention that is not causal, or whose scores depend on distances, and the dropping of tokens, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moec.artifacts.model import ExpertsLayer
from moec.compiler.kernels import reference
from moec.compiler.kernels.cpu.attention import attention
from moec.compiler.kernels.cpu.cache_append import append_kernel
from moec.compiler.kernels.cpu.capacity import capacity
from tests.support.capacities import CAPACITIES, drawn_choices
from tests.support.source_attention import SPECS, SourceCase

Compile = Callable[[Any, int], Callable[..., None]]
TOLERANCE = 5e-6
CANARIES = ("t5 encoder", "cross")
MOST_SLOW = [name if name in CANARIES else pytest.param(name, marks=pytest.mark.slow) for name in SPECS]


@pytest.mark.parametrize("name", MOST_SLOW)
def test_matches_the_reference(compiled: Compile, name: str) -> None:
    spec = SPECS[name]
    case = SourceCase(spec, (75, 1, 33, 40))
    if spec.cross:
        compiled(append_kernel(spec, lanes=8), 8)(*case.append_arguments())
        case.check_cache()
    compiled(attention(spec, lanes=8), 8)(*case.arguments())
    assert case.error() < TOLERANCE
    case.check_cache()


@pytest.mark.parametrize("layer", CAPACITIES)
def test_choices_beyond_the_capacity_lose_their_weight(compiled: Compile, layer: ExpertsLayer) -> None:
    drop = compiled(capacity("drop", layer), 8)
    calls = np.array([0] * 20 + [20] * 9 + [29, 30, 31], np.int32)
    index, weight = drawn_choices(layer, len(calls))
    out = torch.empty(weight.shape)
    drop(index, weight, torch.from_numpy(calls), out)
    expected = reference.keep_within_capacity(layer, index.numpy(), weight.double().numpy(), calls.tolist())
    np.testing.assert_array_equal(out.numpy(), expected.astype(np.float32))
    assert (expected[:20] == 0).sum() >= 5
    assert (expected[29:] > 0).all()
