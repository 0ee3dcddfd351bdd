"""A whole bundle on the emulated GPU: the tokens of the CPU, memory within the budget and given back."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from moec import runtime
from moec.errors import BudgetError, BundleError, DeviceError, RequestError
from moec.runtime.loading import cuda as loading_cuda
from moec.runtime.loading import cuda_section
from tests.support.cuda_stub import Stub
from tests.support.emulated_models import CACHE, PROMPTS, compiled, nothing_left, planned, rows

Load = Callable[..., runtime.Model]


@pytest.fixture(scope="module")
def bundle(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of float32 weights, so that the emulated GPU computes what the CPU computes."""
    return compiled(tmp_path_factory.mktemp("model"), "f32", torch.float32)


@pytest.fixture
def load(bundle: Path, stub: Stub) -> Iterator[Load]:
    """``runtime.load`` of it on the GPU; every test leaves the GPU empty."""

    def load_it(**options: Any) -> runtime.Model:
        return runtime.load(
            bundle, **{"device": "cuda:0", "verify": "sizes", "cache_tokens": CACHE, **options}
        )

    yield load_it
    nothing_left(stub)


@pytest.fixture(scope="module")
def on_cpu(bundle: Path) -> Iterator[runtime.Model]:
    with runtime.load(bundle, verify="sizes") as model:
        yield model


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"do_sample": True, "seed": 3, "temperature": 0.8}, marks=pytest.mark.slow),
        {"do_sample": True, "seed": 4, "top_k": 12, "top_p": 0.9},
        pytest.param({"repetition_penalty": 1.5}, marks=pytest.mark.slow),
        {"do_sample": True, "seed": 5, "repetition_penalty": 1.3, "top_k": 20},
        {"eos_token_id": [1, 2, 3], "min_new_tokens": 4},
        {"eos_token_id": list(range(60)), "min_new_tokens": 4},
    ],
)
def test_tokens_are_those_of_the_cpu(load: Load, on_cpu: runtime.Model, options: dict[str, Any]) -> None:
    """The last options forbid more tokens than the kernel takes, so the host chooses."""
    prompts = [list(prompt) for prompt in PROMPTS]
    expected = rows(on_cpu, prompts, **options)
    with load(max_batch=3, max_step_tokens=16) as model:
        assert rows(model, prompts, **options) == expected
        # Slots and pages that other sequences had before do not matter.
        assert rows(model, prompts[::-1], **options)[-1] == rows(on_cpu, prompts[::-1], **options)[-1]


def test_logits_are_those_of_the_cpu(load: Load, on_cpu: runtime.Model) -> None:
    expected = on_cpu.forward([PROMPTS[2]])
    with load() as model:
        found = model.forward([PROMPTS[2]])
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        assert found.tobytes() == model.forward([PROMPTS[2]]).tobytes()


@pytest.mark.slow
def test_16_bit_weights_round_the_input_of_large_steps_alone(stub: Stub, tmp_path: Path) -> None:
    """In steps of at most eight tokens only cached keys differ, by where they round to 16 bits."""
    path = compiled(tmp_path, "bf16", torch.bfloat16)
    with runtime.load(path, verify="sizes") as model:
        expected = model.forward([PROMPTS[2]])
    few: dict[str, Any] = {"max_batch": 3, "max_step_tokens": 8}
    more: dict[str, Any] = {}
    for limits, tolerance in ((few, 1e-3), (more, 2e-2)):
        with runtime.load(path, device="cuda:0", verify="sizes", cache_tokens=CACHE, **limits) as model:
            found = model.forward([PROMPTS[2]])
            assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
            assert found.tobytes() == model.forward([PROMPTS[2]]).tobytes()


def test_routing_is_traced_on_a_gpu_too(load: Load, on_cpu: runtime.Model) -> None:
    expected = on_cpu.trace([PROMPTS[0]], 3)
    with load() as model:
        rows(model, [PROMPTS[1]])
        found = model.trace([PROMPTS[0]], 3)
    assert found.tokens == expected.tokens
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        np.testing.assert_array_equal(mine.experts, theirs.experts)


def test_a_decode_step_is_one_graph(load: Load, stub: Stub) -> None:
    with load() as model:
        for _ in range(3):
            rows(model, [PROMPTS[0]])
        assert stub.counts().graphs == 1
        rows(model, [list(prompt) for prompt in PROMPTS])
        assert stub.counts().graphs > 1


def test_the_budget_is_exact_and_checked_before_anything_is_allocated(load: Load, stub: Stub) -> None:
    with load() as model:
        plan = planned(model)
        rows(model, [PROMPTS[0]])
        assert stub.counts().device_bytes == plan.total_bytes - plan.needs.code_bytes
    with load(device_memory=plan.total_bytes) as model:
        assert rows(model, [PROMPTS[0]])
    with load(device_memory=plan.total_bytes - 1, max_step_tokens=plan.needs.step_tokens) as model:
        assert planned(model).slots is not None
    too_little = plan.total_bytes - plan.needs.expert_bytes - plan.needs.table_bytes
    with pytest.raises(BudgetError, match="device_memory is") as caught:
        load(device_memory=too_little, max_step_tokens=plan.needs.step_tokens)
    assert "lower cache_tokens" in caught.value.do
    with pytest.raises(RequestError, match="device_memory='lots'"):
        load(device_memory="lots")


def test_the_cache_takes_what_the_limit_leaves(load: Load) -> None:
    with load() as model:
        needs = planned(model).needs
    page = needs.cache_page_bytes
    tight: dict[str, Any] = {"device_memory": needs.fixed_bytes + 3 * page + 256, "cache_tokens": None}
    with load(max_step_tokens=needs.step_tokens, **tight) as model:
        assert model.memory.cache_pages == 3
    with load(cache_tokens=None) as model:
        assert model.memory.cache_pages == 8 * -(-model.record.max_context // 32)


def test_steps_get_smaller_before_experts_leave(load: Load, on_cpu: runtime.Model) -> None:
    with load() as model:
        largest = planned(model)
        assert model.engine.limits.max_step_tokens == largest.needs.step_tokens > 512
    with load(max_step_tokens=9) as model:
        smallest = planned(model)
    between = (largest.total_bytes + smallest.total_bytes) // 2
    for limit, least, most in (
        (smallest.total_bytes, 9, 9),
        (between, 10, largest.needs.step_tokens // 2),
        (largest.total_bytes, largest.needs.step_tokens, largest.needs.step_tokens),
    ):
        with load(device_memory=limit) as model:
            assert least <= model.engine.limits.max_step_tokens <= most
            assert planned(model).total_bytes <= limit
            assert rows(model, [PROMPTS[2]]) == rows(on_cpu, [PROMPTS[2]])
    with load(device_memory=smallest.total_bytes - 1) as model:
        assert planned(model).slots is not None


def test_a_gpu_that_others_use_has_less(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    with load() as model:
        needed = model.memory.total_bytes
    monkeypatch.setenv("MOEC_STUB_MEMORY", str(needed - 1))
    with pytest.raises(BudgetError, match="1 B of them are not free"):
        load(device_memory=needed)


def test_a_damaged_weight_is_found_while_it_is_brought_over(load: Load, bundle: Path, tmp_path: Path) -> None:

    copy = shutil.copytree(bundle, tmp_path / "copy")
    path = min((copy / "weights").glob("experts-*"))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{path.name} was changed"):
        runtime.load(copy, device="cuda:0", cache_tokens=CACHE)


@pytest.mark.parametrize(
    ("room", "stage"),
    [
        (loading_cuda, "read_bundle"),
        (cuda_section, "Binder"),
        (cuda_section, "DeviceSampler"),
        (loading_cuda, "stamp"),
    ],
)
def test_a_load_that_fails_leaves_nothing_behind(
    load: Load, monkeypatch: pytest.MonkeyPatch, room: ModuleType, stage: str
) -> None:
    """Also while weights are on their way, and while the GPU is starting."""
    threads = set(threading.enumerate())

    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError(stage)

    monkeypatch.setattr(room, stage, fail)
    with pytest.raises(RuntimeError, match=stage):
        load(verify="full")
    assert set(threading.enumerate()) <= threads


def test_progress_counts_every_byte_once(bundle: Path, load: Load) -> None:
    from moec.artifacts.files.reader import read_manifest

    seen: list[int] = []
    load(verify="full", progress=seen.append).close()
    assert sum(seen) == sum(record.size_bytes for record in read_manifest(bundle).files.values())


@pytest.mark.parametrize(("capability", "runs"), [("90", True), ("100", True), ("89", False)])
def test_a_gpu_that_the_bundle_has_no_code_for_is_refused(
    load: Load, monkeypatch: pytest.MonkeyPatch, capability: str, runs: bool
) -> None:
    """sm_90 code runs on sm_90; its PTX on what came later."""
    monkeypatch.setenv("MOEC_STUB_CAPABILITY", capability)
    if runs:
        load().close()
        return
    with pytest.raises(DeviceError, match=r"Stub GPU \(sm_89\)") as caught:
        load()
    assert "cuda-sm_90 for sm_90" in caught.value.why


def test_a_gpu_that_is_not_there_is_named(load: Load) -> None:
    with pytest.raises(DeviceError, match="no GPU cuda:7") as caught:
        load(device="cuda:7")
    assert "cuda:0 (Stub GPU)" in caught.value.why


def test_doctor_and_plan_know_the_gpu(stub: Stub, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moec.runtime.devices.measure import gpu_record, gpu_records, this_machine

    (gpu,) = gpu_records()
    assert (gpu.name, gpu.architecture, gpu.driver) == ("Stub GPU", "sm_90", "CUDA 13.0")
    assert gpu_record("cuda:0").memory_bytes == gpu.memory_bytes
    machine, fed = (this_machine(bundle, gpu=gpu, fed=fed) for fed in (False, True))
    assert machine.gpu_name == "Stub GPU"
    assert fed.link_efficiency > machine.link_efficiency
    assert stub.counts().device_blocks == 0


def test_another_model_runs_while_the_engine_of_a_closed_one_is_held(
    load: Load, on_cpu: runtime.Model
) -> None:
    first = load()
    rows(first, [PROMPTS[0]])
    engine = first.engine
    first.close()
    with load() as second:
        assert rows(second, [PROMPTS[0]]) == rows(on_cpu, [PROMPTS[0]])
    with pytest.raises(DeviceError, match="closed"):
        one_step(engine)
    with load() as third:
        assert rows(third, [PROMPTS[1]]) == rows(on_cpu, [PROMPTS[1]])


def one_step(engine: runtime.Engine) -> None:
    request = runtime.Request((3, 4, 5), 2, 0, frozenset(), runtime.Sampling(), 0)
    engine.add(request)
    engine.step()


def test_a_model_that_is_never_closed_leaves_nothing_behind(load: Load) -> None:
    model = load()
    rows(model, [PROMPTS[0]])
    del model
