"""Models whose experts do not fit the emulated GPU, with no help of the CPU: the bits of the resident run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import runtime
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.layout.footprint import footprint
from moec.errors import BudgetError, BundleError, DeviceError
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
from tests.support.canaries import most_slow
from tests.support.cuda_stub import Stub
from tests.support.emulated_models import CACHE, PROMPTS, compiled, nothing_left, planned, rows
from tests.support.emulated_offload import (
    LONG,
    answers,
    budget,
    cut_step,
    host_budget,
    resident,
    slots_of,
)


@pytest.fixture(scope="module")
def bundle(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("model"), "bf16", torch.bfloat16)


@pytest.fixture
def load(bundle: Path, stub: Stub) -> Iterator[Callable[..., runtime.Model]]:
    def load_it(**options: Any) -> runtime.Model:
        facts: dict[str, Any] = {"device": "cuda:0", "verify": "sizes", "cache_tokens": CACHE, "max_batch": 3}
        facts |= {"cpu_threads": 0} | options
        return runtime.load(bundle, **facts)

    yield load_it
    nothing_left(stub)


@pytest.fixture(scope="module")
def expected(bundle: Path, stub: Stub) -> dict[str, Any]:
    return resident(bundle)


@pytest.mark.parametrize("share", most_slow([0.0, 0.04, 0.6, 0.85], [0.0, 0.6]))
def test_bits_are_those_of_the_resident_run(
    load: Callable[..., runtime.Model], expected: dict[str, Any], bundle: Path, share: float, stub: Stub
) -> None:
    limit = budget(expected, share, bundle)
    with load(device_memory=limit, max_step_tokens=160) as model:
        slots = slots_of(model)
        assert sum(layer.slots for layer in slots.layers) < sum(layer.experts for layer in slots.layers)
        found = answers(model)
        assert model.memory.total_bytes <= limit
        assert stub.counts().device_bytes == model.memory.total_bytes - planned(model).needs.code_bytes
        assert found == {name: expected[name] for name in found}
        assert model.stats.misses > 0
        assert (model.stats.hits > 0) == (slots.slot_bytes > 0)


@pytest.mark.slow
def test_experts_through_rings_have_the_bits_of_the_resident_run(stub: Stub, tmp_path: Path) -> None:
    path = compiled(tmp_path, "bf16", torch.bfloat16, rings=True)
    wanted = resident(path)
    limits: dict[str, Any] = {"device_memory": budget(wanted, 0.6, path), "max_step_tokens": 160}
    limits["cpu_threads"] = 0
    with runtime.load(
        path, device="cuda:0", verify="sizes", cache_tokens=CACHE, max_batch=3, **limits
    ) as model:
        found = answers(model)
        assert found == {name: wanted[name] for name in found}
        assert model.stats.misses > 0


@pytest.mark.slow
def test_float32_experts_are_computed_when_all_of_a_layer_are_there(stub: Stub, tmp_path: Path) -> None:
    path = compiled(tmp_path, "f32", torch.float32)
    wanted = resident(path)
    limits: dict[str, Any] = {"device_memory": budget(wanted, 0.7, path), "max_step_tokens": 160}
    limits["cpu_threads"] = 0
    with runtime.load(
        path, device="cuda:0", verify="sizes", cache_tokens=CACHE, max_batch=3, **limits
    ) as model:
        assert slots_of(model).slot_bytes
        found = answers(model)
        assert found == {name: wanted[name] for name in found}


def test_decoding_is_one_graph_a_step_also_where_experts_are_missing(
    load: Callable[..., runtime.Model], expected: dict[str, Any], bundle: Path, stub: Stub
) -> None:
    with load(device_memory=budget(expected, 0.7, bundle), max_step_tokens=160) as model:
        for _ in range(3):
            assert rows(model, [PROMPTS[0]]) == expected["one"]
        assert stub.counts().graphs == 1
        model.stats.reset()
        assert (model.stats.hits, model.stats.misses) == (0, 0)
        rows(model, [PROMPTS[0]])
        layers = slots_of(model).layers
        assert model.stats.misses > 0
        assert model.stats.bytes_moved == model.stats.misses * layers[0].stride_bytes


@pytest.mark.parametrize(
    "shares", most_slow([(0.7, 0.0), (0.7, 0.04), (0.8, 0.6), (0.9, 0.85)], [(0.7, 0.0), (0.9, 0.85)])
)
def test_experts_beyond_host_memory_come_from_the_file(
    load: Callable[..., runtime.Model],
    expected: dict[str, Any],
    bundle: Path,
    shares: tuple[float, float],
) -> None:
    """Shares of the experts in host memory, and on the GPU."""
    hosted, on_device = shares
    limits = {
        "device_memory": budget(expected, on_device, bundle),
        "host_memory": host_budget(expected, hosted, bundle),
    }
    with load(**limits, max_step_tokens=160) as model:
        slots = slots_of(model)
        assert sum(layer.hosted for layer in slots.layers) < sum(layer.experts for layer in slots.layers)
        found = answers(model)
        assert found == {name: expected[name] for name in found}


def test_budgets_that_hold_too_little_are_errors_before_anything_is_allocated(
    load: Callable[..., runtime.Model], expected: dict[str, Any], bundle: Path
) -> None:
    with pytest.raises(BudgetError, match="device_memory is"):
        load(device_memory=budget(expected, 0.0, bundle) - 1, max_step_tokens=160)
    limits = budget(expected, 0.1, bundle), host_budget(expected, 0.1, bundle)
    with pytest.raises(BudgetError, match="host_memory is"):
        load(device_memory=limits[0], host_memory=limits[1], max_step_tokens=160)


def test_a_file_that_is_truncated_while_it_is_used_is_a_typed_error(
    load: Callable[..., runtime.Model], expected: dict[str, Any], bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    model = runtime.load(
        copy,
        device="cuda:0",
        verify="sizes",
        cache_tokens=CACHE,
        max_batch=3,
        device_memory=budget(expected, 0.1, bundle),
        host_memory=host_budget(expected, 0.7, bundle),
        max_step_tokens=160,
        cpu_threads=0,
    )
    with model:
        for path in (copy / "weights").glob("experts-*"):
            path.write_bytes(path.read_bytes()[:4096])
        with pytest.raises(BundleError, match="ends after"):
            rows(model, [LONG])


def test_routing_is_traced_with_experts_off_the_gpu(
    load: Callable[..., runtime.Model], expected: dict[str, Any], bundle: Path
) -> None:
    with load(max_step_tokens=160) as model:
        wanted = model.trace([LONG], 3)
    with load(device_memory=budget(expected, 0.2, bundle), max_step_tokens=160) as model:
        found = model.trace([LONG], 3)
    for mine, theirs in zip(found.layers, wanted.layers, strict=True):
        np.testing.assert_array_equal(mine.experts, theirs.experts)


def test_pinned_memory_that_is_refused_is_a_typed_error_and_leaves_nothing(
    load: Callable[..., runtime.Model],
    expected: dict[str, Any],
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fixture sees that nothing stays pinned or allocated."""
    monkeypatch.setenv("MOEC_STUB_PINNED", "100000")
    with pytest.raises(BudgetError, match="cannot be pinned"):
        load(device_memory=budget(expected, 0.7, bundle), max_step_tokens=160)


def test_an_interrupted_load_leaves_nothing(
    load: Callable[..., runtime.Model],
    expected: dict[str, Any],
    bundle: Path,
) -> None:
    stride = footprint(open_bundle(bundle, verify="sizes").model).layers[0].stride_bytes

    def interrupt(size: int) -> None:
        if size == stride:
            raise KeyboardInterrupt

    limits = {"device_memory": budget(expected, 0.7, bundle), "max_step_tokens": 160}
    with pytest.raises(KeyboardInterrupt):
        load(verify="full", progress=interrupt, **limits)


def test_a_damaged_expert_is_found_on_its_way_to_host_memory(
    load: Callable[..., runtime.Model], expected: dict[str, Any], bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    path = min((copy / "weights").glob("experts-*"))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    limits: dict[str, Any] = {"device_memory": budget(expected, 0.7, bundle), "max_step_tokens": 160}
    with pytest.raises(BundleError, match=f"{path.name} was changed"):
        runtime.load(copy, device="cuda:0", cache_tokens=CACHE, max_batch=3, cpu_threads=0, **limits)


class Interrupts:
    """A streamer that is stopped by Ctrl-C after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


def test_ctrl_c_while_decoding_leaves_a_model_that_goes_on(
    load: Callable[..., runtime.Model], expected: dict[str, Any], bundle: Path
) -> None:
    with load(device_memory=budget(expected, 0.7, bundle), max_step_tokens=160) as model:
        with pytest.raises(KeyboardInterrupt):
            rows(model, [PROMPTS[0]], streamer=Interrupts(4))
        assert not model.engine.scheduler.running
        assert rows(model, [PROMPTS[0]]) == expected["one"]


def test_a_step_that_ends_in_its_middle_leaves_no_slot_with_an_expert_that_never_came(
    load: Callable[..., runtime.Model],
    expected: dict[str, Any],
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = open_bundle(bundle, verify="sizes")
    with load(device_memory=budget(expected, 0.6, bundle), max_step_tokens=160) as model:
        for fetch, prompt in enumerate((*PROMPTS[:2], *PROMPTS[:2])):
            cut_step(model, list(prompt), fetch, files, monkeypatch)
        assert model.stats.evictions > 0, "nothing was given a slot"
        assert rows(model, [PROMPTS[0]]) == expected["one"]


def test_a_kernels_error_while_decoding_is_typed_and_everything_is_given_back(
    load: Callable[..., runtime.Model],
    expected: dict[str, Any],
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After such an error a GPU answers every call with it; the fixture sees that nothing stays allocated."""

    def broken(*_: object) -> None:
        raise DeviceError("CUDA_ERROR_ILLEGAL_ADDRESS.", "A kernel failed.", "Load the model again.")

    with load(device_memory=budget(expected, 0.7, bundle), max_step_tokens=160) as model:
        assert rows(model, [PROMPTS[0]]) == expected["one"]
        with monkeypatch.context() as patch:
            for name in ("synchronize", "wait", "launch", "copy_in", "copy_out"):
                patch.setattr(NvidiaDriver, name, broken)
            with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
                rows(model, [PROMPTS[1]])
            model.close()
