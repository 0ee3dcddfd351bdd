"""Models whose missing experts a copy engine brings: the GPU is the stub, the thread that feeds it is real."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moec import runtime
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.words import mailbox, orders
from moec.errors import DeviceError
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
from moec.runtime.devices.cuda.offload import employing, feeding, helping
from moec.runtime.devices.cuda.offload.feeding import DEVICE_BYTES, CopyFeeder
from moec.runtime.devices.cuda.offload.helping import device_bytes
from tests.support.cuda_stub import Stub
from tests.support.emulated_models import CACHE, PROMPTS, compiled, nothing_left, planned, rows
from tests.support.emulated_offload import (
    answers,
    budget,
    check_slots,
    cut_step,
    parts,
    planned_ahead,
    resident,
)
from tests.support.order_books import WRITE_VALUE
from tests.support.waiting import HANG_NS

Load = Callable[..., runtime.Model]
STEP = 160
OPTIONS: dict[str, Any] = {
    "device": "cuda:0",
    "verify": "sizes",
    "cache_tokens": CACHE,
    "max_batch": 3,
    "max_step_tokens": STEP,
    "cpu_threads": 0,
    "copy_thread": True,
}


@pytest.fixture(scope="module")
def bundle(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("model"), "f32", torch.float32)


@pytest.fixture(scope="module")
def expected(bundle: Path, stub: Stub) -> dict[str, Any]:
    return resident(bundle)


@pytest.fixture
def load(
    bundle: Path, stub: Stub, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Load]:
    monkeypatch.setattr(feeding, "PATIENCE_NS", HANG_NS)
    monkeypatch.setattr(employing, "FED_LEAST_BYTES", 0)

    def load_it(share: float, *, more: int = 0, **options: Any) -> runtime.Model:
        memory = budget(expected, share, bundle) + DEVICE_BYTES + more
        return runtime.load(bundle, **{**OPTIONS, "device_memory": memory, **options})

    yield load_it
    nothing_left(stub)
    assert not copy_threads()


def copy_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("moec-copies")]


def feeder_of(model: runtime.Model) -> CopyFeeder:
    feeder = parts(model).feeder
    assert feeder is not None
    return feeder


@pytest.mark.parametrize("share", [0.9, pytest.param(0.3, marks=pytest.mark.slow)])
def test_bits_are_those_of_the_resident_run(
    load: Load, expected: dict[str, Any], share: float, stub: Stub
) -> None:
    with load(share) as model:
        found = answers(model)
        assert {name: expected[name] for name in found} == found
        stats = model.stats
        assert 0 < stats.engine_bytes < stats.bytes_moved
        assert stats.late_orders == 0
        assert stub.counts().device_bytes == model.memory.total_bytes - planned(model).needs.code_bytes
        assert stub.counts().graphs > 0
        assert "feeds the GPU's copy engine" in " ".join(model.notes)


def test_a_thread_that_hangs_costs_time_and_nothing_else(
    load: Load, expected: dict[str, Any], bundle: Path
) -> None:
    with load(0.9) as model:
        rows(model, [PROMPTS[0]])
        assert model.stats.late_orders == 0
        feeder = feeder_of(model)
        feeder.feeder._finalizer()  # it has left
        feeder._book.words[orders.PATIENCE] = 10**6
        assert rows(model, [PROMPTS[0]]) == expected["one"]
        assert model.stats.late_orders == 1, "orders were made that nobody fills"
        check_slots(model, open_bundle(bundle, verify="sizes"))


def test_a_refused_copy_is_a_typed_error(load: Load) -> None:
    with load(0.9) as model:
        rows(model, [PROMPTS[0]])
        feeder_of(model).feeder._answers[orders.COUNTER] = 8  # no memory of the GPU's
        with pytest.raises(DeviceError, match="An expert was not copied"):
            rows(model, [list(PROMPTS[1])])


@pytest.mark.slow
def test_a_step_that_is_cut_short_is_mended(
    load: Load, expected: dict[str, Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(0.9) as model:
        rows(model, [PROMPTS[0]])
        cut_step(model, list(PROMPTS[1]), 1, open_bundle(bundle, verify="sizes"), monkeypatch)
        assert rows(model, [PROMPTS[0]]) == expected["one"]


@pytest.mark.parametrize("how", ["close", pytest.param("forget", marks=pytest.mark.slow)])
def test_the_thread_ends_before_its_memory(load: Load, how: str) -> None:
    model = load(0.9)
    rows(model, [PROMPTS[0]])
    assert len(copy_threads()) == 1
    if how == "close":
        model.close()
    del model
    gc.collect()
    assert not copy_threads()


@pytest.mark.parametrize("fed", [None, pytest.param(False, marks=pytest.mark.slow)])
def test_a_thread_without_a_share_feeds_unless_it_must_not(
    load: Load, bundle: Path, expected: dict[str, Any], fed: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helping, "cpu_shares", lambda _, most: (0,) * (most + 1))
    more = device_bytes(open_bundle(bundle, verify="sizes").model, STEP) - DEVICE_BYTES
    with load(0.9, more=more, cpu_threads=1, copy_thread=fed) as model:
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("moec-expert")]
        assert (parts(model).feeder is not None) == (fed is None) == bool(copy_threads())
        assert rows(model, [PROMPTS[0]]) == expected["one"]
        assert model.stats.cpu_misses == 0


_cannot = WRITE_VALUE(lambda *_: 801)


@pytest.mark.slow
@pytest.mark.parametrize("fed", [None, True])
def test_a_system_whose_streams_write_no_values(
    load: Load, bundle: Path, expected: dict[str, Any], fed: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error where the thread was asked for."""
    entry, cannot = NvidiaDriver.entry, ctypes.cast(_cannot, ctypes.c_void_p).value
    monkeypatch.setattr(helping, "cpu_shares", lambda _, most: (0,) * (most + 1))
    monkeypatch.setattr(
        NvidiaDriver, "entry", lambda own, name: cannot if "Write" in name else entry(own, name)
    )
    more = device_bytes(open_bundle(bundle, verify="sizes").model, STEP)
    if fed:
        with pytest.raises(DeviceError, match="The driver answered 801"):
            load(0.9, more=more, cpu_threads=1, copy_thread=fed)
        return
    with load(0.9, more=more, cpu_threads=1, copy_thread=fed) as model:
        assert parts(model).feeder is None
        assert rows(model, [PROMPTS[0]]) == expected["one"]


def test_cpu_threads_0_starts_no_thread(load: Load) -> None:
    with load(0.9, cpu_threads=0, copy_thread=None) as model:
        assert parts(model).feeder is None
        assert not copy_threads()


@pytest.mark.slow
def test_it_feeds_beside_a_share_of_the_cpu_and_guesses(
    load: Load, bundle: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helping, "cpu_shares", lambda _, most: tuple((n + 1) // 2 for n in range(most + 1)))
    more = device_bytes(open_bundle(bundle, verify="sizes").model, STEP) + planned_ahead(bundle).size_bytes
    with load(0.3, more=more, cpu_threads=1, prefetch=True) as model:
        for _ in range(3):
            assert rows(model, [PROMPTS[0]]) == expected["one"]
            assert rows(model, [list(prompt) for prompt in PROMPTS], max_new_tokens=6) == expected["three"]
        assert model.stats.cpu_misses > 0
        assert model.stats.engine_bytes > 0
        assert feeder_of(model).feeder._state.control[mailbox.EPOCH] > 0


def test_a_model_that_is_dropped_gives_everything_back_at_once(load: Load, stub: Stub) -> None:
    """And not when Python looks for circles of objects some time: the next one is loaded before that."""
    gc.collect()
    gc.disable()
    try:
        model = load(0.9, cpu_threads=1)
        rows(model, [PROMPTS[0]])
        assert len(copy_threads()) == 1
        del model
        alive = stub.counts()._replace(launches=0, copies=0)
        assert tuple(alive) == (0,) * len(alive), alive
        assert not copy_threads()
    finally:
        gc.enable()
