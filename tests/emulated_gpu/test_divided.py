"""A model divided among several emulated GPUs: the bits of one, each within its budget and in its own memory alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import runtime
from moec.artifacts.footprint import footprint
from moec.artifacts.traces import load_traces
from moec.errors import BudgetError, DeviceError, RequestError
from moec.runtime.experts.slots import state_bytes
from moec.runtime.memory.device_budget import DevicePlan
from moec.runtime.memory.divided import DividedPlan
from tests.support.canaries import most_slow
from tests.support.cuda_stub import Stub
from tests.support.emulated_models import CACHE, PROMPTS, compiled, nothing_left, rows
from tests.support.emulated_offload import LONG, answers, host_budget, resident

SPARE = 16 << 10
"""The division is chosen by what both GPUs need about, and held against what each needs."""
BOTH = ["cuda:0", "cuda:1"]


@pytest.fixture(scope="module")
def bundle(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("model"), "bf16", torch.bfloat16, "deepseek_v2_lite_6")


@pytest.fixture(scope="module")
def expected(bundle: Path, stub: Stub) -> dict[str, Any]:
    return resident(bundle)


@pytest.fixture(params=["straight", "through the host"])
def load(
    bundle: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Callable[..., runtime.Model]]:
    """``runtime.load`` of it on two GPUs; every test leaves both empty."""
    monkeypatch.setenv("MOEC_STUB_GPUS", "2")
    monkeypatch.setenv("MOEC_STUB_PEERS", str(int(request.param == "straight")))

    def load_it(**options: Any) -> runtime.Model:
        facts: dict[str, Any] = {"device": BOTH, "verify": "sizes", "cache_tokens": CACHE, "max_batch": 3}
        return runtime.load(bundle, **facts | {"max_step_tokens": 160} | options)

    yield load_it
    nothing_left(stub)


def divided(model: runtime.Model) -> DividedPlan:
    assert isinstance(model.memory, DividedPlan)
    return model.memory


def budgets(load: Callable[..., runtime.Model], share: float) -> list[int]:
    """For each of two GPUs: room for a stage, and slots for about a share of the experts of its layers."""
    with load() as model:
        plans, sections = divided(model).plans, divided(model).sections
    found = []
    for plan, section in zip(plans, sections, strict=True):
        layers = footprint(section.bundle.model).layers
        stage = max(layer.experts * layer.stride_bytes for layer in layers)
        base = plan.total_bytes - plan.needs.expert_bytes - plan.needs.table_bytes + state_bytes(layers)
        found.append(base + stage + int(share * plan.needs.expert_bytes) + SPARE)
    return found


def test_bits_are_those_of_one_gpu(
    load: Callable[..., runtime.Model], expected: dict[str, Any], stub: Stub
) -> None:
    with load() as model:
        plan = divided(model)
        assert all(each.slots is None for each in plan.plans)
        assert [each.first for each in plan.sections] == [0, plan.sections[0].end]
        assert "cuda:0 runs layers 0 to " in model.notes[0]
        found = answers(model)
        assert found == {name: expected[name] for name in found}
        taken = sum(each.total_bytes - each.needs.code_bytes for each in plan.plans)
        assert stub.counts().device_bytes == taken


@pytest.mark.parametrize("share", most_slow([0.0, 0.2, 0.5], [0.2]))
def test_each_gpu_fetches_the_experts_of_its_layers(
    load: Callable[..., runtime.Model], expected: dict[str, Any], share: float, stub: Stub
) -> None:
    with load(device_memory=budgets(load, share)) as model:
        plans = divided(model).plans
        assert any(each.slots is not None for each in plans)
        assert all(each.total_bytes <= each.limit_bytes for each in plans)
        found = answers(model)
        assert found == {name: expected[name] for name in found}
        assert model.stats.misses > 0
        graphs = stub.counts().graphs
        rows(model, [PROMPTS[0]])
        assert stub.counts().graphs == graphs > 0
        assert model.notes[1:] == (
            "The CPU computes no experts beside several GPUs: each fetches those that it misses.",
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "seed": 3, "temperature": 0.8},
        {"do_sample": True, "seed": 4, "repetition_penalty": 1.5},
        {"eos_token_id": list(range(60)), "min_new_tokens": 4},
    ],
)
def test_tokens_are_those_of_one_gpu_whoever_chooses_them(
    load: Callable[..., runtime.Model], bundle: Path, options: dict[str, Any]
) -> None:
    prompts = [list(prompt) for prompt in PROMPTS]
    with runtime.load(bundle, device="cuda:0", verify="sizes", cache_tokens=CACHE, max_batch=3) as model:
        wanted = rows(model, prompts, **options)
    with load() as model:
        assert rows(model, prompts, **options) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [True, False])
def test_experts_beyond_host_memory_and_guessed_ones(
    load: Callable[..., runtime.Model], expected: dict[str, Any], bundle: Path, prefetch: bool
) -> None:
    limits: dict[str, Any] = {"device_memory": budgets(load, 0.4), "prefetch": prefetch}
    if not prefetch:
        limits["host_memory"] = 2 * host_budget(expected, 0.4, bundle) + (8 << 20)
    with load(**limits) as model:
        found = answers(model)
        assert found == {name: expected[name] for name in found}
        assert (model.stats.prefetch.chosen > 0) == prefetch


def test_routing_is_recorded_of_all_layers(
    load: Callable[..., runtime.Model], bundle: Path, tmp_path: Path
) -> None:
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
    load: Callable[..., runtime.Model],
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


def test_a_model_that_is_never_closed_leaves_nothing_behind(load: Callable[..., runtime.Model]) -> None:
    model = load()
    rows(model, [PROMPTS[0]])
    del model


def test_what_cannot_be_is_said_before_anything_is_allocated(
    load: Callable[..., runtime.Model], expected: dict[str, Any], stub: Stub
) -> None:
    with pytest.raises(DeviceError, match="cuda:1 is named twice"):
        load(device="cuda:1, cuda:1")
    with pytest.raises(DeviceError, match="no GPU cuda:2"):
        load(device=["cuda:0", "cuda:2"])
    with pytest.raises(DeviceError, match="no device 'cpu'"):
        load(device=["cuda:0", "cpu"])
    with pytest.raises(RequestError, match="3 amounts for 2 GPUs"):
        load(device_memory="1GiB,1GiB,1GiB")
    with pytest.raises(RequestError, match="cpu_threads=2 does not go"):
        load(cpu_threads=2)
    with pytest.raises(RequestError, match="copy_thread does not go"):
        load(copy_thread=True)
    plan: DevicePlan = expected["plan"]
    with pytest.raises(BudgetError, match="does not hold the model") as caught:
        load(device_memory=plan.needs.code_bytes + 1000)
    assert "Dense weights take" in caught.value.why
    nothing_left(stub)


def test_a_smaller_gpu_gets_fewer_layers(
    load: Callable[..., runtime.Model], expected: dict[str, Any]
) -> None:
    plan: DevicePlan = expected["plan"]
    experts, fixed = plan.needs.expert_bytes, plan.total_bytes - plan.needs.expert_bytes
    with load(device_memory=[fixed + int(0.35 * experts), fixed + experts]) as model:
        first, second = divided(model).plans
        assert first.slots is None is second.slots
        assert first.expert_bytes < second.expert_bytes
        assert rows(model, [PROMPTS[0]]) == expected["one"]


def test_gpus_of_other_kinds_run_what_the_bundle_has_for_them(
    load: Callable[..., runtime.Model], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
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
