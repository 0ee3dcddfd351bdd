"""Bundles of quantized weights on the emulated GPU: the CPU's numbers, and the same bits when experts do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import runtime
from tests.support.cuda_stub import Stub
from tests.support.emulated_models import CACHE, PROMPTS, compiled, nothing_left
from tests.support.emulated_offload import answers, budget, resident

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["int4", "int8", "mxfp4"])
def bundle(stub: Stub, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("model"), "bf16", torch.bfloat16, quantization=str(request.param))


@pytest.fixture(autouse=True)
def nothing_is_left(stub: Stub) -> Iterator[None]:
    yield
    nothing_left(stub)


def test_logits_are_those_of_the_cpu(bundle: Path, stub: Stub) -> None:
    """In steps of at most eight tokens only cached keys differ, by where they round to 16 bits."""
    with runtime.load(bundle, verify="sizes") as model:
        expected = model.forward([PROMPTS[2]])
    few: dict[str, Any] = {"max_batch": 3, "max_step_tokens": 8}
    more: dict[str, Any] = {}
    for limits, tolerance in ((few, 1e-3), (more, 2e-2)):
        with runtime.load(bundle, device="cuda:0", verify="sizes", cache_tokens=CACHE, **limits) as model:
            found = model.forward([PROMPTS[2]])
            assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
            assert found.tobytes() == model.forward([PROMPTS[2]]).tobytes()


def test_bits_are_those_of_the_resident_run(bundle: Path, stub: Stub) -> None:
    expected = resident(bundle)
    for share in (0.04, 0.6):
        limit = budget(expected, share, bundle)
        facts: dict[str, Any] = {"device": "cuda:0", "verify": "sizes", "cache_tokens": CACHE, "max_batch": 3}
        with runtime.load(bundle, device_memory=limit, max_step_tokens=160, cpu_threads=0, **facts) as model:
            found = answers(model)
            assert found == {name: expected[name] for name in found}
            assert model.stats.misses > 0
