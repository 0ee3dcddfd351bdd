"""Models with states on the emulated GPU: captured steps, running ahead, rows used again, experts off it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moec import runtime
from moec.compiler.lowering import cuda_module
from moec.runtime.device_budget import DevicePlan
from tests.support.compiling import compile_checkpoint
from tests.support.cuda_stub import Stub, write_image
from tests.support.tiny_models import save

PROMPTS = ([11, 12, 13, 14, 15, 16, 17], [90, 5, 77], list(range(40, 80)), [3] * 18)
NEW = 10
MODELS = ("qwen3_next", "granitemoehybrid", "jamba", "kimi_linear", "minimax")
"""One of each kind of recurrence, and of each way through its kernels."""


@pytest.fixture(scope="module")
def bundles(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bundles of float32 weights with code for the CPU, and for the emulator where a GPU's would be."""

    @cache
    def compiled(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        save(name, folder / "checkpoint")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_module, "_machine_code", lambda source, target: source)
            patch.setattr(cuda_module, "write_fatbin", write_image)
            compile_checkpoint(
                folder / "checkpoint", folder / "model.moec", dtype="f32", targets=("cpu", "cuda-sm_90")
            )
        return folder / "model.moec"

    return compiled


def rows(model: runtime.Model) -> list[list[int]]:
    """More prompts than there are rows, in steps shorter than the longest."""
    prompts = [list(prompt) for prompt in PROMPTS]
    found = model.generate(prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=[])
    return [row[-NEW:].tolist() for row in found]


@pytest.mark.slow
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
    gc.collect()
    assert tuple(stub.counts()._replace(launches=0, copies=0)) == (0,) * len(stub.counts())
