"""Models with states on the emulated GPU: captured steps, running ahead, rows used again, experts off it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moec import runtime
from moec.runtime.memory.device_budget import DevicePlan
from tests.support.cuda_stub import Stub
from tests.support.emulated_models import nothing_left

pytestmark = pytest.mark.slow

PROMPTS = ([11, 12, 13, 14, 15, 16, 17], [90, 5, 77], list(range(40, 80)), [3] * 18)
NEW = 10
MODELS = ("qwen3_next", "granitemoehybrid", "jamba", "kimi_linear", "minimax")
"""One of each kind of recurrence, and of each way through its kernels."""


def rows(model: runtime.Model) -> list[list[int]]:
    """More prompts than there are rows, in steps shorter than the longest."""
    prompts = [list(prompt) for prompt in PROMPTS]
    found = model.generate(prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=[])
    return [row[-NEW:].tolist() for row in found]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_cpu(name: str, bundles: Callable[[str], Path], stub: Stub) -> None:
    bundle = bundles(name)
    with runtime.load(bundle, verify="sizes", max_batch=3, max_step_tokens=16) as on_cpu:
        expected, logits = rows(on_cpu), on_cpu.forward([PROMPTS[2]])
    options = {
        "device": "cuda:0",
        "verify": "sizes",
        "max_batch": 3,
        "max_step_tokens": 16,
        "cache_tokens": 512,
    }
    with runtime.load(bundle, **options) as model:  # type: ignore[arg-type]
        assert rows(model) == expected
        assert rows(model) == expected
        found = model.forward([PROMPTS[2]])
        assert np.abs(found - logits).max() < 1e-4 * np.abs(logits).max()
        plan = model.memory
        assert isinstance(plan, DevicePlan)
        assert plan.needs.state_bytes > 0
        assert stub.counts().device_bytes == plan.total_bytes - plan.needs.code_bytes
        limit = plan.total_bytes - 3 * plan.expert_bytes // 4
    with runtime.load(bundle, device_memory=limit, **options) as model:  # type: ignore[arg-type]
        assert rows(model) == expected
        assert model.stats.misses > 0
    nothing_left(stub)
