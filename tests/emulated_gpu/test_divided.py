"""A model divided among two emulated GPUs: the bits of one, each within its budget and in its own memory alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.errors import BudgetError, DeviceError, RequestError
from moec.runtime.devices.measure import gpu_peers, gpu_records
from moec.runtime.memory.device_budget import DevicePlan
from tests.support.cuda_stub import Stub
from tests.support.emulated_divided import WAYS, Load, budgets, divided, on_two
from tests.support.emulated_models import PROMPTS, compiled, nothing_left, rows
from tests.support.emulated_offload import answers, resident


@pytest.fixture(scope="module")
def bundle(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("model"), "bf16", torch.bfloat16)


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


@pytest.fixture
def load_straight(bundle: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    yield on_two(bundle, WAYS[0], monkeypatch)
    nothing_left(stub)


def test_bits_are_those_of_one_gpu(load: Load, expected: dict[str, Any], stub: Stub) -> None:
    with load() as model:
        plan = divided(model)
        assert all(each.slots is None for each in plan.plans)
        assert [each.first for each in plan.sections] == [0, plan.sections[0].end]
        assert "cuda:0 runs layers 0 to " in model.notes[0]
        found = answers(model)
        assert found == {name: expected[name] for name in found}
        taken = sum(each.total_bytes - each.needs.code_bytes for each in plan.plans)
        assert stub.counts().device_bytes == taken


def test_each_gpu_fetches_the_experts_of_its_layers(
    load_straight: Load, expected: dict[str, Any], stub: Stub
) -> None:
    """Neither has room for a slot; half of a layer passes through at once."""
    with load_straight(device_memory=budgets(load_straight, 0.5, staged=False)) as model:
        plans = divided(model).plans
        assert any(each.slots is not None for each in plans)
        assert all(each.total_bytes <= each.limit_bytes for each in plans)
        found = answers(model)
        assert found == {name: expected[name] for name in found}
        assert model.stats.misses > 0
        graphs = stub.counts().graphs
        rows(model, [PROMPTS[0]])
        assert stub.counts().graphs == graphs > 0
        assert model.notes[1:] == ("cpu_threads is 0: missing experts go over the link alone.",)


def test_a_model_that_is_never_closed_leaves_nothing_behind(load_straight: Load) -> None:
    model = load_straight()
    rows(model, [PROMPTS[0]])
    del model


def test_what_cannot_be_is_said_before_anything_is_allocated(
    load_straight: Load, expected: dict[str, Any], stub: Stub
) -> None:
    with pytest.raises(DeviceError, match="cuda:1 is named twice"):
        load_straight(device="cuda:1, cuda:1")
    with pytest.raises(DeviceError, match="no GPU cuda:2"):
        load_straight(device=["cuda:0", "cuda:2"])
    with pytest.raises(DeviceError, match="no device 'cpu'"):
        load_straight(device=["cuda:0", "cpu"])
    with pytest.raises(RequestError, match="3 amounts for 2 GPUs"):
        load_straight(device_memory="1GiB,1GiB,1GiB")
    with pytest.raises(RequestError, match="cpu_threads=1 is too few"):
        load_straight(cpu_threads=1)
    with pytest.raises(RequestError, match="copy_thread does not go"):
        load_straight(copy_thread=True)
    plan: DevicePlan = expected["plan"]
    with pytest.raises(BudgetError, match="does not hold the model") as caught:
        load_straight(device_memory=plan.needs.code_bytes + 1000)
    assert "Dense weights take" in caught.value.why
    nothing_left(stub)


def test_doctor_knows_which_gpus_reach_each_other(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEC_STUB_GPUS", "3")
    assert gpu_peers() == [(0, 1), (0, 2), (1, 2)]
    assert [gpu.name for gpu in gpu_records()] == ["Stub GPU", "Stub GPU 1", "Stub GPU 2"]
    monkeypatch.setenv("MOEC_STUB_PEERS", "0")
    assert gpu_peers() == []
    nothing_left(stub)
