from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moec.errors import BudgetError, DeviceError
from moec.runtime.devices.cuda.device import CudaDevice, check_ordinal
from moec.runtime.devices.names import parse_ordinal
from moec.runtime.devices.protocol import HostCall, PackedCall, View
from moec.runtime.stats import Stats
from tests.support.fake_driver import FakeDriver


def device(driver: FakeDriver, limit_bytes: int = 1 << 20) -> CudaDevice:
    made = CudaDevice(driver, 0, lambda *_: None)
    made.open(limit_bytes, 4096)
    return made


def packed(function: Callable[..., Any]) -> PackedCall:
    return PackedCall("experts", function, ())


def test_writes_reads_and_gathers_reach_the_same_memory() -> None:
    gpu = device(FakeDriver())
    memory = gpu.hold(np.arange(12, dtype=np.int32).reshape(4, 3))
    target = gpu.allocate(36)
    gpu.gather(memory.address, target.address, [0, 2, 3], 12)
    found = gpu.read(View(target.address, "int32", (3, 3)))
    np.testing.assert_array_equal(found, [[0, 1, 2], [6, 7, 8], [9, 10, 11]])
    assert (gpu.read(View(gpu.allocate(64).address, "uint8", (64,))) == 0).all()


def test_rows_that_are_neighbours_are_one_copy() -> None:
    driver = FakeDriver()
    gpu = device(driver)
    memory, target = gpu.hold(np.zeros(64, np.uint8)), gpu.allocate(64)
    driver.log.clear()
    gpu.gather(memory.address, target.address, [1, 2, 3, 5, 6, 0], 4)
    assert driver.log == ["copy_within"] * 3


def test_mirrors_share_one_copy_a_step_and_wait_for_the_last() -> None:
    driver = FakeDriver()
    gpu = device(driver)
    first, second = np.arange(6, dtype=np.int32), np.ones((2, 3), np.float32)
    mirrors = [gpu.mirror(first), gpu.mirror(second)]
    run = gpu.prepare([packed(lambda: None)], Stats())
    driver.log.clear()
    for mirror in mirrors:
        mirror.update()
    run()
    assert driver.log == ["wait", "copy_in", "record"]
    assert gpu.read(View(mirrors[1].address, "float32", (2, 3))).tolist() == second.tolist()
    first[:] = 9
    mirrors[0].update(2)
    run()
    assert gpu.read(View(mirrors[0].address, "int32", (6,))).tolist() == [9, 9, 2, 3, 4, 5]


def test_only_lists_that_run_often_and_without_the_host_become_graphs() -> None:
    driver = FakeDriver()
    gpu = device(driver)
    seldom = gpu.prepare([packed(lambda: None)], Stats())
    shared = gpu.prepare([packed(lambda: None), HostCall("experts", lambda: None)], Stats(), often=True)
    often = gpu.prepare([packed(lambda: None)], Stats(), often=True)
    for run in (seldom, shared, often):
        for _ in range(3):
            run()
    assert (seldom.captured, shared.captured, often.captured) == (False, False, True)
    assert driver.log.count("begin_capture") == 1
    assert driver.log.count("launch") == 2


def test_a_graph_that_was_captured_with_a_copy_holds_it() -> None:
    driver = FakeDriver()
    gpu = device(driver)
    mirror = gpu.mirror(np.zeros(4, np.int32))
    run = gpu.prepare([packed(lambda: None)], Stats(), often=True)
    driver.log.clear()
    for _ in range(3):
        mirror.update()
        run()
    eager, captured = ["wait", "copy_in", "record"], ["wait", "begin_capture", "copy_in", "end_capture"]
    assert driver.log == [*eager, *captured, "launch", "record", "wait", "launch", "record"]


def test_time_goes_to_the_stages() -> None:
    stats = Stats()
    gpu = device(FakeDriver())
    gpu.prepare([packed(lambda: sum(range(1000)))], stats)()
    assert stats.milliseconds["experts"] > 0


def test_a_limit_below_the_staging_block_is_a_budget_error() -> None:
    driver = FakeDriver()
    gpu = CudaDevice(driver, 0, lambda *_: None)
    with pytest.raises(BudgetError, match="96 bytes too small"):
        gpu.open(4000, 4096)
    gpu.close()
    assert not any(driver.alive.values())


def test_device_names() -> None:
    assert [parse_ordinal(name) for name in ("cuda", "cuda:0", "cuda:3")] == [0, 0, 3]
    for name in ("cuda:", "cuda:x", "cuda0", "cuda:-1"):
        with pytest.raises(DeviceError, match="no device"):
            parse_ordinal(name)
    check_ordinal(FakeDriver(gpus=2), 1)
    with pytest.raises(DeviceError, match="no GPU cuda:2") as caught:
        check_ordinal(FakeDriver(gpus=2), 2)
    assert "cuda:1 (Fake GPU 1)" in caught.value.why
