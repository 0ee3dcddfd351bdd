"""TVM's real CUDA library and cuda-bindings on the stub: modules, launches, graphs, staging."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.artifacts.program import HOPPER
from moec.errors import BundleError, DeviceError
from moec.runtime.device import HostCall, PackedCall, View
from moec.runtime.devices.cuda.device import CudaDevice
from moec.runtime.devices.cuda.driver.functions import Handle
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
from moec.runtime.devices.cuda.modules.module import load_functions
from moec.runtime.stats import Stats
from tests.support.cuda_modules import FILES, add_one, write_emulated
from tests.support.cuda_stub import Stub

N = 100


@pytest.fixture(scope="module")
def folder(modules: Path) -> Path:
    write_emulated(modules, add_one(), add_one("add_some", 2.0), add_one(f"add_some{HOPPER}", 3.0))
    return modules


def floats(device: CudaDevice, count: int = N) -> tuple[Any, View]:
    memory = device.hold(np.arange(count, dtype=np.float32))
    return memory, View(memory.address, "float32", (count,))


def test_a_kernel_is_found_by_its_host_function_and_runs(device: CudaDevice, folder: Path) -> None:
    function = device.load(folder, FILES).get("add_one")
    (_x, source), (_y, target) = floats(device), floats(device)
    function(device.tensor(source), device.tensor(target))
    np.testing.assert_array_equal(device.read(target), np.arange(N) + 1)
    with pytest.raises(BundleError, match="no function add_two"):
        device.load(folder, FILES).get("add_two")


@pytest.mark.parametrize(("capability", "added"), [((9, 0), 3), ((8, 9), 2), ((10, 0), 2)])
def test_hopper_gpus_have_functions_of_their_own(
    device: CudaDevice, folder: Path, capability: tuple[int, int], added: int
) -> None:
    function = load_functions(folder, FILES, capability).get("add_some")
    (_x, source), (_y, target) = floats(device), floats(device)
    function(device.tensor(source), device.tensor(target))
    np.testing.assert_array_equal(device.read(target), np.arange(N) + added)


def test_a_target_without_a_file_is_an_error(device: CudaDevice, folder: Path) -> None:
    with pytest.raises(BundleError, match=r"has no kernels\.json"):
        device.load(folder, FILES[:2])


def test_a_list_of_calls_becomes_a_graph_when_it_runs_again(
    device: CudaDevice, folder: Path, stub: Stub
) -> None:
    function = device.load(folder, FILES).get("add_one")
    memory, view = floats(device)
    tensor = device.tensor(view)
    run = device.prepare([PackedCall("segments", function, (tensor, tensor))] * 3, Stats(), often=True)
    for turn in range(1, 4):
        run()
        assert run.captured == (turn > 1)
        np.testing.assert_array_equal(device.read(view), np.arange(N) + 3 * turn)
    assert stub.counts().graphs == 1
    del run
    gc.collect()
    assert stub.counts().graphs == 0
    assert memory.size_bytes == 512


def test_what_the_host_stages_is_copied_once_a_step_and_in_time(
    device: CudaDevice, folder: Path, stub: Stub
) -> None:
    """The stub copies only when somebody waits, so host writes that come too early would be seen."""
    function = device.load(folder, FILES).get("add_one")
    arrays = np.zeros(N, np.float32), np.zeros(8, np.int32)
    mirrors = [device.mirror(array) for array in arrays]
    memory, result = floats(device)
    source = device.tensor(View(mirrors[0].address, "float32", (N,)))
    run = device.prepare(
        [PackedCall("segments", function, (source, device.tensor(result)))], Stats(), often=True
    )
    wanted = []
    for turn in range(6):
        before = stub.counts().copies
        arrays[0][:] = turn
        for mirror in mirrors:
            mirror.update()
        run()
        arrays[0][:] = -1
        if turn % 2:
            wanted.append(device.read(result)[0])
            assert stub.counts().copies - before <= 2
    assert wanted == [2, 4, 6]
    assert memory.address == result.address


def test_a_call_that_fails_in_a_capture_leaves_the_stream_usable(device: CudaDevice, stub: Stub) -> None:
    calls = []

    def fails_later() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("not now")

    run = device.prepare([PackedCall("segments", fails_later, ())], Stats(), often=True)
    run()
    with pytest.raises(ValueError, match="not now"):
        run()
    assert stub.counts().graphs == 0
    memory, view = floats(device)
    np.testing.assert_array_equal(device.read(view), np.arange(N))
    run()
    assert run.captured
    assert memory.address


def test_ctrl_c_as_a_capture_begins_leaves_the_stream_usable(
    device: CudaDevice, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = device.prepare([PackedCall("segments", lambda: None, ())], Stats(), often=True)
    run()
    begin = NvidiaDriver.begin_capture

    def interrupted(driver: NvidiaDriver, stream: Handle) -> None:
        begin(driver, stream)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NvidiaDriver, "begin_capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    memory, view = floats(device)
    np.testing.assert_array_equal(device.read(view), np.arange(N))
    run()
    assert run.captured
    assert memory.address


def test_what_a_list_left_half_done_is_put_right_before_the_next(device: CudaDevice) -> None:
    order: list[str] = []
    interrupts = True

    def second() -> None:
        if interrupts:
            raise KeyboardInterrupt
        order.append("second")

    calls = [HostCall("experts", lambda: order.append("first")), HostCall("experts", second)]
    device.unfinished.repair_with(lambda: order.append("repair"))
    run = device.prepare(calls, Stats())
    with pytest.raises(KeyboardInterrupt):
        run()
    interrupts = False
    run()
    run()
    assert order == ["first", "repair", "first", "second", "first", "second"]


def test_a_gpu_before_sm_90_is_not_asked_for_early_launches(
    stub: Stub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEC_STUB_CAPABILITY", "89")
    device = CudaDevice(NvidiaDriver(), 0)
    device.open(1 << 20, 256)
    try:
        function = device.load(folder, FILES).get("add_one")
        memory, view = floats(device)
        function(device.tensor(view), device.tensor(view))
        np.testing.assert_array_equal(device.read(view), np.arange(N) + 1)
        del function
    finally:
        device.close()
    assert memory.size_bytes
    assert stub.counts().device_blocks == 0


def test_a_host_library_of_another_kind_of_machine_is_refused(
    device: CudaDevice, folder: Path, tmp_path: Path
) -> None:
    for name in FILES:
        shutil.copyfile(folder / name, tmp_path / name)
    (tmp_path / FILES[0]).write_bytes(b"\x7fELF of another machine")
    with pytest.raises(DeviceError, match=rf"module {FILES[0]} cannot be loaded on this machine"):
        device.load(tmp_path, FILES)


def test_modules_leave_the_gpu_with_their_last_user(device: CudaDevice, folder: Path, stub: Stub) -> None:
    gc.collect()
    before = stub.counts().modules
    functions = device.load(folder, FILES)
    assert device.load(folder, FILES) is functions
    function = functions.get("add_one")
    memory, view = floats(device)
    function(device.tensor(view), device.tensor(view))
    assert stub.counts().modules == before + 1
    del function, functions
    gc.collect()
    assert stub.counts().modules == before
    assert memory.address


def test_a_function_that_outlives_its_module_does_the_next_one_no_harm(
    device: CudaDevice, tmp_path: Path
) -> None:
    """As where a closed model is still somebody's while the next is loaded.

    A host library finds its kernels once and keeps where they are, so one that is still in the process must not be met
    again. The second time it comes with other machine code, which shows whose kernel runs.
    """
    (_x, source), (_y, target) = floats(device), floats(device)
    kept: list[Any] = []
    for added in (1.0, 2.0, 3.0):
        made, folder = tmp_path / str(added), tmp_path / "bundle"
        made.mkdir()
        folder.mkdir(exist_ok=True)
        write_emulated(made, add_one("add_some", added))
        for name in FILES[1:] if kept else FILES:
            shutil.copyfile(made / name, folder / name)
        gc.collect()
        function = device.load(folder, FILES).get("add_some")
        function(device.tensor(source), device.tensor(target))
        np.testing.assert_array_equal(device.read(target), np.arange(N) + added)
        kept.append(function)


def test_functions_of_a_bundle_that_was_compiled_again_are_the_new_ones(
    device: CudaDevice, tmp_path: Path
) -> None:
    """While a model has those that were in the same place."""
    (_x, source), (_y, target) = floats(device), floats(device)
    loaded = []
    for added in (1.0, 2.0):
        shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
        (tmp_path / "bundle").mkdir()
        write_emulated(tmp_path / "bundle", add_one("add_some", added))
        loaded.append(device.load(tmp_path / "bundle", FILES))
    for functions, added in zip(loaded, (1.0, 2.0), strict=True):
        functions.get("add_some")(device.tensor(source), device.tensor(target))
        np.testing.assert_array_equal(device.read(target), np.arange(N) + added)


def test_the_driver_of_a_forked_process_says_that_there_is_none(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    NvidiaDriver()
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(DeviceError, match=r"cannot use GPUs\.\nIt was forked"):
        NvidiaDriver()


def test_use_after_close_says_so(stub: Stub) -> None:
    device = CudaDevice(NvidiaDriver(), 0)
    device.open(1 << 20, 256)
    device.close()
    device.close()
    with pytest.raises(DeviceError, match="closed"):
        device.allocate(100)
    assert stub.counts().contexts == 0
