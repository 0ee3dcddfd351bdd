from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moec.errors import BudgetError, DeviceError
from moec.runtime.device import HostCall, PackedCall, View
from moec.runtime.devices.cuda.device import CudaDevice, check_ordinal
from moec.runtime.devices.cuda.staging import SMALL_BYTES, joined
from moec.runtime.devices.names import parse_ordinal
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


def test_what_was_written_is_copied_before_a_graph_too() -> None:
    driver = FakeDriver()
    gpu = device(driver)
    mirror = gpu.mirror(np.zeros(4, np.int32))
    run = gpu.prepare([packed(lambda: None)], Stats(), often=True)
    driver.log.clear()
    for _ in range(3):
        mirror.update()
        run()
    run()
    copied = ["wait", "copy_in", "record"]
    captured = ["begin_capture", "end_capture", "launch"]
    assert driver.log == [*copied, *copied, *captured, *copied, "launch", "launch"]


def test_neighbours_go_in_one_copy_and_of_large_mirrors_only_what_was_written() -> None:
    driver = FakeDriver()
    gpu = CudaDevice(driver, 0, lambda *_: None)
    gpu.open(1 << 20, 8 * SMALL_BYTES)
    small = [np.full(100, number, np.int32) for number in range(3)]
    large = np.arange(SMALL_BYTES, dtype=np.int32).reshape(-1, 1024)
    mirrors = [gpu.mirror(array) for array in (*small, large)]
    for mirror in mirrors:
        mirror.update()
    run = gpu.prepare([packed(lambda: None)], Stats())
    driver.log.clear()
    run()
    assert driver.log == ["copy_in", "record"]
    for array in (*small, large):
        array += 5
    driver.log.clear()
    for mirror in mirrors[:2]:
        mirror.update(1)
    mirrors[3].update(1, 3)
    run()
    assert driver.log == ["wait", "copy_in", "copy_in", "record"]
    found = gpu.read(View(mirrors[3].address, "int32", large.shape))
    changed = np.zeros(large.shape, np.bool_)
    changed[3] = True
    np.testing.assert_array_equal(found, np.where(changed, large, large - 5))
    assert [gpu.read(View(mirror.address, "int32", (1,)))[0] for mirror in mirrors[:3]] == [5, 6, 2]


def test_parts_that_touch_are_one() -> None:
    assert joined([(8, 12), (0, 4), (4, 8), (20, 24), (2, 3)]) == [(0, 12), (20, 24)]
    assert joined([]) == []


def test_two_results_are_kept_while_more_is_put_into_the_stream() -> None:
    driver = FakeDriver()
    gpu = device(driver)
    memory, results = gpu.hold(np.arange(3, dtype=np.int64)), gpu.results(64)
    view = View(memory.address, "int64", (3,))
    first = results.begin(view)
    gpu.write(memory.address, np.arange(3, 6, dtype=np.int64))
    second = results.begin(view)
    gpu.write(memory.address, np.zeros(3, np.int64))
    driver.log.clear()
    assert (first().tolist(), second().tolist()) == ([0, 1, 2], [3, 4, 5])
    assert driver.log == ["wait", "wait"]


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
