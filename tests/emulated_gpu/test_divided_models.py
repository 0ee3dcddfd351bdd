"""A deeper model divided among two emulated GPUs, and models of other kinds: slots, files, guesses, samplers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import runtime
from moec.artifacts.files.traces import load_traces
from moec.errors import DeviceError
from moec.runtime.memory.device_budget import DevicePlan
from tests.support.cuda_stub import Stub
from tests.support.emulated_divided import WAYS, Load, budgets, divided, on_two
from tests.support.emulated_models import CACHE, PROMPTS, compiled, nothing_left, rows
from tests.support.emulated_offload import LONG, answers, host_budget, resident

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("model"), "bf16", torch.bfloat16, "deepseek_v2_lite_6")


@pytest.fixture(scope="module")
def expected(bundle: Path, stub: Stub) -> dict[str, Any]:
    return resident(bundle)


@pytest.fixture(params=WAYS)
def load(
    bundle: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Load]:
    """Every test leaves both GPUs empty."""
    yield on_two(bundle, request.param, monkeypatch)
    nothing_left(stub)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_each_gpu_fetches_the_experts_of_its_layers(
    load: Load, expected: dict[str, Any], share: float
) -> None:
    with load(device_memory=budgets(load, share)) as model:
        plans = divided(model).plans
        assert any(each.slots is not None for each in plans)
        assert all(each.total_bytes <= each.limit_bytes for each in plans)
        found = answers(model)
        assert found == {name: expected[name] for name in found}
        assert model.stats.misses > 0


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "seed": 3, "temperature": 0.8},
        {"do_sample": True, "seed": 4, "repetition_penalty": 1.5},
        {"eos_token_id": list(range(60)), "min_new_tokens": 4},
    ],
)
def test_tokens_are_those_of_one_gpu_whoever_chooses_them(
    load: Load, bundle: Path, options: dict[str, Any]
) -> None:
    prompts = [list(prompt) for prompt in PROMPTS]
    with runtime.load(bundle, device="cuda:0", verify="sizes", cache_tokens=CACHE, max_batch=3) as model:
        wanted = rows(model, prompts, **options)
    with load() as model:
        assert rows(model, prompts, **options) == wanted


@pytest.mark.parametrize("prefetch", [True, False])
def test_experts_beyond_host_memory_and_guessed_ones(
    load: Load, expected: dict[str, Any], bundle: Path, prefetch: bool
) -> None:
    limits: dict[str, Any] = {"device_memory": budgets(load, 0.4), "prefetch": prefetch}
    if not prefetch:
        limits["host_memory"] = 2 * host_budget(expected, 0.4, bundle) + (8 << 20)
    with load(**limits) as model:
        found = answers(model)
        assert found == {name: expected[name] for name in found}
        assert (model.stats.prefetch.chosen > 0) == prefetch


def test_routing_is_recorded_of_all_layers(load: Load, bundle: Path, tmp_path: Path) -> None:
    """By the GPUs themselves while tokens are chosen there, and by the host where prompts are traced."""
    found = []
    for name, options in (("one", {"device": "cuda:0"}), ("two", {})):
        with load(**options, trace_path=tmp_path / name) as model:
            rows(model, [PROMPTS[0], PROMPTS[1]])
            traced = model.trace([PROMPTS[2]], 2)
        found.append([*traced.layers, *load_traces(tmp_path / name).layers])
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(mine.experts, theirs.experts)


def test_a_step_that_was_cut_short_leaves_both_right(
    load: Load,
    expected: dict[str, Any],
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C before the second GPU has its calls."""
    with load(device_memory=budgets(load, 0.3)) as model:
        rows(model, [PROMPTS[0]])

        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        section = model.engine._executor.sections[1]  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setattr(section, "run_part", interrupt)
            with pytest.raises(KeyboardInterrupt):
                rows(model, [PROMPTS[1]])
        assert rows(model, [PROMPTS[0]]) == expected["one"]


def test_a_smaller_gpu_gets_fewer_layers(load: Load, expected: dict[str, Any]) -> None:
    plan: DevicePlan = expected["plan"]
    experts, fixed = plan.needs.expert_bytes, plan.total_bytes - plan.needs.expert_bytes
    with load(device_memory=[fixed + int(0.35 * experts), fixed + experts]) as model:
        first, second = divided(model).plans
        assert first.slots is None is second.slots
        assert first.expert_bytes < second.expert_bytes
        assert rows(model, [PROMPTS[0]]) == expected["one"]


def test_gpus_of_other_kinds_run_what_the_bundle_has_for_them(
    load: Load, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is newer than the bundle: other kernels, whose sums may differ in their last bits."""
    monkeypatch.setenv("MOEC_STUB_SECOND_CAPABILITY", "100")
    with load() as model:
        logits = np.frombuffer(expected["logits"], np.float32)
        found = model.forward([LONG[:40]]).ravel()
        assert np.abs(found - logits).max() < 2e-2 * np.abs(logits).max()
    monkeypatch.setenv("MOEC_STUB_SECOND_CAPABILITY", "80")
    with pytest.raises(DeviceError, match=r"no code for this GPU, Stub GPU 1 \(sm_80\)"):
        load()


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v32_selecting", "gpt_oss", "granitemoehybrid"])
def test_states_indexes_and_windows_stay_with_their_layers(
    name: str, bundles: Callable[[str], Path], stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More prompts than rows, in steps shorter than the longest; float32, tokens and logits of one GPU."""
    load, found = on_two(bundles(name), WAYS[1], monkeypatch), []
    prompts = [*map(list, PROMPTS), [3] * 18]
    for device in ("cuda:0", ["cuda:0", "cuda:1"]):
        with load(device=device, max_step_tokens=16) as model:
            found.append((rows(model, prompts), model.forward([PROMPTS[2]]).tobytes()))
    assert found[0] == found[1]
    nothing_left(stub)
