"""A whole model on the GPU with a part of its experts off it: the bits of the resident run, and the memory's limit."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.support.budgets import host_limit, limit_of_share
from moec import runtime
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.layout.footprint import footprint
from moec.runtime.devices.cuda.offload.feeding import DEVICE_BYTES
from moec.runtime.memory.device_budget import DevicePlan
from tests.gpu.conftest import Load
from tests.gpu.test_model import PROMPTS, greedy, used_bytes

STEP: dict[str, Any] = {"max_step_tokens": 160, "max_batch": 3, "cache_tokens": 512}
LONG = list(range(200, 350))


@pytest.fixture(scope="module")
def resident(bundle: Path) -> dict[str, Any]:
    """What the model says with all its experts on the GPU, and what it takes besides them."""
    with runtime.load(bundle, device="cuda:0", verify="sizes", **STEP) as model:
        assert isinstance(model.memory, DevicePlan)
        return {"plan": model.memory, **answers(model)}


def answers(model: runtime.Model) -> dict[str, Any]:
    return {
        "tokens": [greedy(model, [list(prompt)])[0] for prompt in PROMPTS],
        "three": greedy(model, [list(prompt) for prompt in PROMPTS]),
        "long": greedy(model, [LONG]),
        "logits": model.forward([LONG])[0].tobytes(),
    }


def limit(bundle: Path, share: float, threads: int = 0) -> int:
    return limit_of_share(bundle, share, threads, max_batch=3, step_tokens=160, cache_tokens=512)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
def test_over_the_link_alone_the_bits_are_those_of_the_resident_run(
    load: Load, bundle: Path, resident: dict[str, Any], share: float
) -> None:
    budget = limit(bundle, share)
    before = used_bytes()
    with load(**STEP, device_memory=budget, cpu_threads=0) as model:
        found = answers(model)
        assert used_bytes() - before <= budget
        assert model.stats.misses > 0
    assert found == {name: resident[name] for name in found}
    assert used_bytes() - before < 4 << 20


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
def test_by_the_copy_engine_the_bits_are_those_of_the_resident_run(
    load: Load, bundle: Path, resident: dict[str, Any], share: float
) -> None:
    budget = limit(bundle, share) + DEVICE_BYTES
    with load(**STEP, device_memory=budget, cpu_threads=0, copy_thread=True) as model:
        for _ in range(2):
            found = answers(model)
            assert found == {name: resident[name] for name in found}
        assert model.stats.engine_bytes > 0
        assert model.stats.late_orders == 0


def test_memory_is_freed_and_code_loaded_beside_steps_that_order(
    load: Load, bundle: Path, resident: dict[str, Any]
) -> None:
    """Both keep the thread that feeds from its driver until the GPU is idle."""
    budget = limit(bundle, 0.25) + DEVICE_BYTES
    with load(**STEP, device_memory=budget, cpu_threads=0, copy_thread=True) as model:
        over = threading.Event()

        def others() -> None:
            while not over.is_set():
                load(max_step_tokens=8, max_batch=1, cache_tokens=64).close()

        beside = threading.Thread(target=others)
        beside.start()
        try:
            for _ in range(20):
                assert greedy(model, [list(prompt) for prompt in PROMPTS]) == resident["three"]
        finally:
            over.set()
            beside.join()


def test_with_the_cpus_help_logits_are_close_and_tokens_the_same(
    load: Load, bundle: Path, resident: dict[str, Any]
) -> None:
    with load(**STEP, device_memory=limit(bundle, 0.25, 3), cpu_threads=3) as model:
        assert [greedy(model, [list(prompt)])[0] for prompt in PROMPTS] == resident["tokens"]
        logits = model.forward([LONG])[0]
    expected = np.frombuffer(resident["logits"], np.float32).reshape(logits.shape)
    assert np.abs(logits - expected).max() / np.abs(expected).max() < 2e-2


def test_experts_beyond_host_memory_come_from_the_file(
    load: Load, bundle: Path, resident: dict[str, Any]
) -> None:
    facts = footprint(open_bundle(bundle, verify="sizes").model)
    host = host_limit(resident["plan"], facts, 0.7)
    with load(**STEP, device_memory=limit(bundle, 0.25), host_memory=host, cpu_threads=0) as model:
        assert isinstance(model.memory, DevicePlan)
        assert model.memory.slots is not None
        assert model.memory.slots.host_bytes < facts.experts_bytes
        found = answers(model)
    assert found == {name: resident[name] for name in found}
