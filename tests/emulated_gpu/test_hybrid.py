"""Models whose experts do not fit the emulated GPU, and of whose missing experts the CPU computes a share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import runtime
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.model import ModelRecord
from moec.artifacts.sharing import MAILBOX_US
from moec.artifacts.words import mailbox
from moec.artifacts.words.slots import MOST_SHARED
from moec.errors import DeviceError
from moec.runtime.devices.cuda.offload import helping, layer_share
from moec.runtime.devices.cuda.offload.helping import device_bytes, host_bytes
from moec.runtime.devices.cuda.offload.layer_share import HostRows
from moec.runtime.devices.cuda.offload.stream_share import StreamShare
from moec.runtime.devices.cuda.rehearsal import GpuRehearsal
from moec.runtime.devices.cuda.sharing import CpuShare
from moec.runtime.sharing.team import Team
from tests.support.cuda_stub import Stub
from tests.support.emulated_divided import WAYS, budgets, divided, on_two
from tests.support.emulated_models import CACHE, PROMPTS, compiled, nothing_left, planned, rows
from tests.support.emulated_offload import LONG, budget, host_budget, parts, planned_ahead

SHORT = LONG[:5]
Load = Callable[..., runtime.Model]
STEP = 160
OPTIONS: dict[str, Any] = {
    "device": "cuda:0",
    "verify": "sizes",
    "cache_tokens": CACHE,
    "max_batch": 3,
    "max_step_tokens": STEP,
}
SHARES = {
    "all": tuple(range(MOST_SHARED + 1)),
    "half": tuple((misses + 1) // 2 for misses in range(MOST_SHARED + 1)),
    "none": (0,) * (MOST_SHARED + 1),
}


@pytest.fixture(scope="module")
def bundle(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("model"), "f32", torch.float32)


@pytest.fixture(scope="module")
def expected(bundle: Path, stub: Stub) -> dict[str, Any]:
    """What the resident model says."""
    with runtime.load(bundle, **OPTIONS) as model:
        return {"plan": planned(model), "tokens": tokens(model), "logits": model.forward([SHORT])}


def tokens(model: runtime.Model) -> list[list[list[int]]]:
    """Of one sequence; of three at once; after a prompt whose step is streamed."""
    prompts = [[PROMPTS[0]], [list(prompt) for prompt in PROMPTS], [LONG]]
    return [rows(model, each, max_new_tokens=3) for each in prompts]


@pytest.fixture
def load(
    bundle: Path, stub: Stub, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Load]:
    def load_it(share: float, by_cpu: str = "half", **options: Any) -> runtime.Model:
        monkeypatch.setattr(helping, "cpu_shares", lambda *_: SHARES[by_cpu])
        memory = budget(expected, share, bundle) + device_bytes(record(bundle), STEP)
        return runtime.load(bundle, **{**OPTIONS, "cpu_threads": 1, "device_memory": memory, **options})

    yield load_it
    nothing_left(stub)


def record(bundle: Path) -> ModelRecord:
    return open_bundle(bundle, verify="sizes").model


@pytest.mark.parametrize(("share", "by_cpu"), [(0.0, "all"), (0.3, "half")])
def test_tokens_are_those_of_the_resident_run(
    load: Load, expected: dict[str, Any], share: float, by_cpu: str, stub: Stub
) -> None:
    with load(share, by_cpu) as model:
        assert tokens(model) == expected["tokens"]
        assert 0 < model.stats.cpu_misses <= model.stats.misses
        assert stub.counts().device_bytes == model.memory.total_bytes - planned(model).needs.code_bytes
        assert stub.counts().graphs > 0


def test_logits_are_close_and_the_same_each_time(load: Load, expected: dict[str, Any]) -> None:
    said = []
    for _ in range(2):
        with load(0.0, "all") as model:
            said.append(model.forward([SHORT]))
            assert model.stats.cpu_misses == model.stats.misses > 0
    np.testing.assert_array_equal(said[0], said[1])
    assert np.abs(said[0] - expected["logits"]).max() < 1e-4 * np.abs(said[0]).max()


@pytest.mark.parametrize(("by_cpu", "threads"), [("none", 1), ("all", 0)])
def test_without_a_share_the_bits_are_those_of_the_resident_run(
    load: Load, expected: dict[str, Any], by_cpu: str, threads: int
) -> None:
    with load(0.2, by_cpu, cpu_threads=threads) as model:
        assert model.forward([SHORT]).tobytes() == expected["logits"].tobytes()
        assert model.stats.misses > model.stats.cpu_misses == 0
        assert ("cpu_threads is 0" in model.notes[0]) == (threads == 0)


def test_shares_follow_from_measured_speeds(bundle: Path, expected: dict[str, Any], stub: Stub) -> None:
    memory = budget(expected, 0.1, bundle) + device_bytes(record(bundle), STEP)
    with runtime.load(bundle, **OPTIONS, cpu_threads=2, device_memory=memory) as model:
        logits = model.forward([SHORT])
        assert np.abs(logits - expected["logits"]).max() < 1e-4 * np.abs(logits).max()
        helper = parts(model).helper
        assert ("2 CPU threads" in model.notes[0]) == (helper is not None)
        if isinstance(helper, CpuShare):
            times = helper.experts_us
            assert len(times) == 1 + record(bundle).experts[0].top_k
            assert times[0] == 0.0
            assert list(times) == sorted(times)


def test_times_are_what_requests_take_beyond_the_layer_and_the_handshake(
    load: Load, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = GpuRehearsal._ask

    def ask(self: GpuRehearsal, count: int) -> float:
        assert asked(self, count) > 0
        return 5.0 + (0.0 if count == 0 else MAILBOX_US + 40.0 * count)

    monkeypatch.setattr(GpuRehearsal, "_ask", ask)
    with load(0.0, "all") as model:
        helper = parts(model).helper
        assert isinstance(helper, CpuShare)
        top_k = record(bundle).experts[0].top_k
        assert helper.experts_us == tuple(40.0 * count for count in range(top_k + 1))


def test_times_that_somebody_disturbed_are_taken_again(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first attempt in which two experts and more waited for a processor that was somebody else's."""
    asked, attempt = 0, GpuRehearsal._attempt

    def disturbed(self: GpuRehearsal) -> tuple[float, ...]:
        nonlocal asked
        asked += 1
        return tuple(
            100.0 * count + (3000.0 if asked == 1 and count > 1 else 0.0)
            for count in range(len(attempt(self)))
        )

    monkeypatch.setattr(GpuRehearsal, "_attempt", disturbed)
    with load(0.0, "all") as model:
        helper = parts(model).helper
        assert isinstance(helper, CpuShare)
        assert helper.experts_us == tuple(100.0 * count for count in range(len(helper.experts_us)))
    assert asked == 2


def test_a_team_that_fails_while_it_is_timed_is_an_error(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Team) -> None:
        raise DeviceError("A CPU thread that computes experts failed.", "It was told to.", "Load again.")

    monkeypatch.setattr(Team, "check", fail)
    with pytest.raises(DeviceError, match="told to"):
        load(0.0, "all")


def test_experts_beyond_host_memory_are_shared_too(
    load: Load, expected: dict[str, Any], bundle: Path
) -> None:
    host = host_budget(expected, 0.6, bundle) + host_bytes(record(bundle), STEP)
    with load(0.0, "half", host_memory=host) as model:
        slots = planned(model).slots
        assert slots is not None
        assert slots.file_places > 0
        assert rows(model, [PROMPTS[0]], max_new_tokens=3) == expected["tokens"][0]
        assert model.stats.cpu_misses > 0


def test_the_cpu_has_a_share_of_a_streamed_prompt(
    load: Load, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile the threads that answer decoding steps sleep: a prompt's list of calls wants nothing of them."""
    compute, awake = HostRows.compute, []

    def run(rows: HostRows) -> None:
        awake.append(control[mailbox.EPOCH] % 2)
        compute(rows)

    monkeypatch.setattr(layer_share, "cpu_share_of_many", lambda _, tokens: len(tokens) // 2)
    monkeypatch.setattr(StreamShare, "takes", lambda *_: True)
    with load(0.3, "all") as model:
        control = parts(model).helper.team._state.control  # type: ignore[union-attr]
        monkeypatch.setattr(HostRows, "compute", run)
        assert rows(model, [LONG], max_new_tokens=3) == expected["tokens"][2]
        assert 0 < model.stats.cpu_misses < model.stats.misses
        assert set(awake) == {0}


@pytest.mark.slow
def test_the_cpu_helps_beside_what_is_brought_ahead(
    load: Load, expected: dict[str, Any], bundle: Path
) -> None:
    memory = (
        budget(expected, 0.3, bundle) + device_bytes(record(bundle), STEP) + planned_ahead(bundle).size_bytes
    )
    for _ in range(3):
        with load(0.3, "half", prefetch=True, device_memory=memory) as model:
            for _ in range(3):
                assert tokens(model) == expected["tokens"]
            stats = model.stats
            assert 0 < stats.cpu_misses < stats.misses, "what is there whole was left to the CPU"
            assert stats.prefetch.wasted_bytes < stats.prefetch.fetched_bytes


@pytest.mark.slow
def test_quantized_experts_choose_the_resident_runs_tokens(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU rounds activations to 16 bits beside experts in four, the GPU does not."""
    bundle = compiled(tmp_path, "bf16", torch.bfloat16, quantization="int4")
    monkeypatch.setattr(helping, "cpu_shares", lambda *_: SHARES["all"])
    few = {**OPTIONS, "max_batch": 1, "max_step_tokens": 4}
    with runtime.load(bundle, **few) as model:
        expected, plan = model.engine.score(tuple(LONG)).copy(), planned(model)
    memory = budget({"plan": plan}, 0.0, bundle) + device_bytes(record(bundle), 4)
    with runtime.load(bundle, **few, cpu_threads=1, device_memory=memory) as model:
        found = model.engine.score(tuple(LONG)).copy()
        assert model.stats.misses >= model.stats.cpu_misses > 0.8 * model.stats.misses > len(LONG)
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    errors = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)
    assert 0 < np.median(errors) < 3e-4
    assert errors.max() < 2e-2
    nothing_left(stub)


def test_each_of_two_gpus_has_threads_of_its_own(
    bundle: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stub: Stub
) -> None:
    monkeypatch.setattr(helping, "cpu_shares", lambda *_: SHARES["half"])
    on_both = on_two(bundle, WAYS[1], monkeypatch)
    sharing = device_bytes(record(bundle), STEP)
    limits = [limit + sharing for limit in budgets(on_both, 0.5, staged=False)]
    with on_both(device_memory=limits, cpu_threads=2) as model:
        assert all(plan.slots is not None for plan in divided(model).plans)
        assert tokens(model) == expected["tokens"]
        assert 0 < model.stats.cpu_misses <= model.stats.misses
        assert model.notes[1].startswith("1 CPU threads compute a share")
        taken = sum(plan.total_bytes - plan.needs.code_bytes for plan in divided(model).plans)
        assert stub.counts().device_bytes == taken
    nothing_left(stub)
