"""Captured steps whose experts the CPU computes: the GPU is the stub, the CPU's threads are real."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.artifacts.ids import LayerId
from moec.artifacts.model import ExpertBody, ExpertsLayer, GenerationDefaults, ModelRecord
from moec.artifacts.words import mailbox
from moec.compiler.kernels.cpu.serve import serve
from moec.compiler.kernels.cuda.mailbox import collect, post
from moec.errors import DeviceError
from moec.runtime.device import HostCall, View
from moec.runtime.devices.cuda.device import CudaDevice
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
from moec.runtime.devices.cuda.sharing import CpuShare, device_bytes, host_bytes
from moec.runtime.stats import Stats
from tests.kernels.test_experts import CLAMPED, SWIGLU
from tests.kernels.test_serve import Layers
from tests.support.cuda_modules import FILES, add_one, write_emulated
from tests.support.cuda_stub import Stub
from tests.support.machine_code import machine_code

HIDDEN, EXPERTS, TOP_K = 64, 7, 3
BODIES = [
    ExpertBody("a", HIDDEN, 33, True, False, False, SWIGLU, "bfloat16"),
    ExpertBody("b", HIDDEN, 20, True, True, True, CLAMPED, "float16"),
]


def moe_model() -> ModelRecord:
    """One MoE layer of each body, and nothing else."""
    layers = [
        ExpertsLayer(LayerId(number), f"layers.{number}", body.name, EXPERTS, TOP_K)
        for number, body in enumerate(BODIES)
    ]
    generation = GenerationDefaults(None, (), None, False, 1.0, 0, 1.0, 1.0)
    bodies, empty = tuple(BODIES), ((), (), ())
    return ModelRecord(
        "tiny", "Tiny", "bfloat16", 8, HIDDEN, 16, {}, *empty, bodies, tuple(layers), (), 0, generation
    )


@cache
def kernel() -> Callable[..., None]:
    found: Callable[..., None] = machine_code(serve(BODIES, lanes=4, machine="x86_64"))[mailbox.SERVE]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, stub: Stub) -> Path:
    folder = tmp_path_factory.mktemp("share")
    write_emulated(folder, add_one(), *(make(body) for body in BODIES for make in (post, collect)))
    return folder


class Step:
    """Two MoE layers of different bodies, of ``tokens`` tokens, as one list of calls."""

    def __init__(self, device: CudaDevice, folder: Path, tokens: int, *, threads: int = 1) -> None:
        self.device, self.layers, self.tokens = device, Layers(BODIES), tokens
        functions = device.load(folder, FILES)
        tables = [layer.table_address for layer in self.layers.shared]
        self.share = CpuShare(device, functions, kernel(), moe_model(), tables, threads)
        self._held: list[Any] = []
        shapes = {"x": (tokens, HIDDEN), "index": (tokens, TOP_K), "weight": (tokens, TOP_K)}
        self.views = [
            {
                name: self.place(np.zeros(shape, np.int64 if name == "index" else np.float32))
                for name, shape in {**shapes, "out": (tokens, HIDDEN)}.items()
            }
            for _ in BODIES
        ]
        self.calls = [call for layer in range(len(BODIES)) for call in self.calls_of(layer)]

    def place(self, array: NDArray[Any]) -> View:
        memory = self.device.hold(array)
        self._held.append(memory)
        return View(memory.address, str(array.dtype), array.shape)

    def calls_of(self, layer: int) -> list[Any]:
        views = self.views[layer]
        posted = self.share.post(layer, views["x"], views["index"], views["weight"])
        return [*posted, *self.share.collect(layer, views["out"])]

    def fill(self, seed: int, *, nothing: bool = False) -> list[NDArray[np.float64]]:
        """Random inputs; what each layer's ``out`` must become."""
        rng, expected = np.random.default_rng(seed), []
        for number, views in enumerate(self.views):
            x, out = (rng.standard_normal((self.tokens, HIDDEN)).astype(np.float32) for _ in range(2))
            index = rng.integers(-1, EXPERTS, (self.tokens, TOP_K))
            if nothing:
                index[:] = -1
            weight = rng.random((self.tokens, TOP_K)).astype(np.float32)
            inputs: dict[str, NDArray[Any]] = {"x": x, "index": index, "weight": weight, "out": out}
            for name, values in inputs.items():
                self.device.write(views[name].address, values)
            expected.append(out + self.layers.expected(number, x, index, weight))
        return expected

    def results(self) -> list[NDArray[np.float32]]:
        return [self.device.read(views["out"]) for views in self.views]


@pytest.mark.parametrize(("tokens", "threads"), [(1, 1), (8, 2)])
def test_steps_are_captured_and_share_their_experts(
    device: CudaDevice, folder: Path, stub: Stub, tokens: int, threads: int
) -> None:
    step = Step(device, folder, tokens, threads=threads)
    run = device.prepare(step.calls, Stats(), often=True)
    for turn in range(4):
        expected = step.fill(turn, nothing=turn == 2)
        run()
        for found, wanted in zip(step.results(), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
        assert run.captured == (turn > 0)
    assert stub.counts().graphs == 1


def test_the_same_share_gives_the_same_bits(device: CudaDevice, folder: Path) -> None:
    step = Step(device, folder, 5, threads=2)
    run = device.prepare(step.calls, Stats(), often=True)
    seen = set()
    for _ in range(3):
        step.fill(11)
        run()
        seen.add(b"".join(found.tobytes() for found in step.results()))
    assert len(seen) == 1


def test_the_host_may_read_in_the_middle_of_a_step(device: CudaDevice, folder: Path) -> None:
    """As it does where routing is recorded: the team must not go to sleep then."""
    step = Step(device, folder, 2)
    first, second = step.calls_of(0), step.calls_of(1)
    looked: list[NDArray[np.float32]] = []
    calls = [*first, HostCall("experts", lambda: looked.append(device.read(step.views[0]["out"]))), *second]
    run = device.prepare(calls, Stats())
    expected = step.fill(1)
    run()
    for found, wanted in zip((looked[0], step.results()[1]), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_the_team_stays_awake_for_a_step_that_was_launched_ahead(device: CudaDevice, folder: Path) -> None:
    step = Step(device, folder, 2)
    run, results = device.prepare(step.calls, Stats(), often=True), device.results(1 << 12)
    control = step.share.team._state.control
    expected = step.fill(3)
    run()
    first = results.begin(step.views[0]["out"])
    run()
    second = results.begin(step.views[1]["x"])
    np.testing.assert_allclose(first(), expected[0], rtol=2e-5, atol=2e-5)
    assert control[mailbox.EPOCH] % 2 == 1
    second()
    assert control[mailbox.EPOCH] % 2 == 0


def test_a_result_that_was_not_answered_for_is_an_error(device: CudaDevice, folder: Path) -> None:
    step = Step(device, folder, 1)
    step.share._box.words[mailbox.LIMIT] = 10**7
    step.share.team._finalizer()
    step.fill(1)
    device.prepare(step.calls, Stats(), often=True)()
    with pytest.raises(DeviceError, match="did not compute"):
        device.results(1 << 12).begin(step.views[0]["out"])()


def test_memory_is_what_was_planned(stub: Stub, folder: Path) -> None:
    device, before = CudaDevice(NvidiaDriver(), 0), stub.counts()
    device.open(64 << 20, 1 << 10)
    used, pinned = stub.counts().device_bytes, device.resources.pinned_bytes
    model = moe_model()
    tables = [layer.table_address for layer in Layers(BODIES).shared]
    share = CpuShare(device, device.load(folder, FILES), kernel(), model, tables, 1)
    assert stub.counts().device_bytes - used == device_bytes(model)
    assert 0 < device.resources.pinned_bytes - pinned < host_bytes(model)
    assert share.team.threads == 1
    device.close()
    assert stub.counts().pinned_blocks == before.pinned_blocks
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moec-expert")]


@pytest.mark.parametrize("how", ["close", "forget"])
def test_threads_end_before_the_memory_that_they_look_at(folder: Path, stub: Stub, how: str) -> None:
    device = CudaDevice(NvidiaDriver(), 0)
    device.open(64 << 20, 1 << 10)
    step = Step(device, folder, 1, threads=2)
    run = device.prepare(step.calls, Stats(), often=True)
    step.fill(1)
    run()  # not waited for: closing has to
    if how == "close":
        device.close()
    del step, run, device
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moec-expert")]
    counts = stub.counts()
    assert (counts.device_blocks, counts.pinned_blocks, counts.contexts) == (0, 0, 0)


def test_a_team_that_does_not_answer_is_a_typed_error_and_steps_go_on(
    device: CudaDevice, folder: Path
) -> None:
    step = Step(device, folder, 1)
    step.share._box.words[mailbox.LIMIT] = 10**7
    step.share.team._finalizer()  # its threads have left
    step.fill(1)
    run = device.prepare(step.calls, Stats(), often=True)
    run()
    with pytest.raises(DeviceError, match="did not compute its experts in time"):
        device.synchronize()
    run()
    with pytest.raises(DeviceError, match="did not compute"):
        step.results()


@pytest.mark.parametrize("cut", [1, 3])
def test_a_step_that_ends_after_a_request_leaves_a_mailbox_that_goes_on(
    device: CudaDevice, folder: Path, cut: int
) -> None:
    """Its sums are never taken, and the team may sleep by then."""
    step = Step(device, folder, 8)
    step.fill(1)
    device.prepare(step.calls[:cut], Stats())()
    device.synchronize()
    expected = step.fill(2)
    device.prepare(step.calls, Stats())()
    for found, wanted in zip(step.results(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_the_gpu_waits_ends_cleanly(device: CudaDevice, folder: Path) -> None:
    """Until one gets through: Python drops what is raised while a finalizer runs."""
    step = Step(device, folder, 8)
    run = device.prepare(step.calls, Stats(), often=True)
    over, turns = threading.Event(), [0]

    def interrupt() -> None:
        """Again only where steps go on: one that comes after the first that got through would end the tests."""
        last = -1
        while not over.wait(0.2):
            if turns[0] > last + 1:
                last = turns[0]
                os.kill(os.getpid(), signal.SIGINT)

    interrupts = threading.Thread(target=interrupt)

    def steps() -> None:
        try:
            interrupts.start()
            for turn in range(100_000):
                turns[0] = turn
                step.fill(1)
                run()
                step.results()
        finally:
            over.set()

    with pytest.raises(KeyboardInterrupt):
        steps()
    interrupts.join()
    expected = step.fill(2)
    run()
    np.testing.assert_allclose(step.results()[0], expected[0], rtol=2e-5, atol=2e-5)
