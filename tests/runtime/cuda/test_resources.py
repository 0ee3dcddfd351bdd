from __future__ import annotations

import gc
import signal
from typing import TYPE_CHECKING, Any

import pytest

from moec.errors import BudgetError, DeviceError
from moec.runtime.devices.cuda.driver.functions import Handle, OutOfDeviceMemoryError
from moec.runtime.devices.cuda.driver.memory import DeviceMemory, PinnedMemory
from moec.runtime.devices.cuda.driver.resources import Resources
from tests.support.fake_driver import FakeDriver

if TYPE_CHECKING:
    from collections.abc import Callable


def resources(driver: FakeDriver, limit_bytes: int = 1 << 20) -> Resources:
    made = Resources(driver, 0)
    made.limit_bytes = limit_bytes
    return made


def test_the_limit_is_checked_before_the_driver_is_asked() -> None:
    driver = FakeDriver()
    own = resources(driver, 1000)
    own.reserve(200)
    address = own.allocate(700)
    driver.log.clear()
    with pytest.raises(BudgetError, match="device_memory is 1 bytes too small") as caught:
        own.allocate(101)
    assert "900 B of 1000 B are in use, and 101 B more" in caught.value.why
    assert driver.log == []
    own.free(address)
    assert own.used_bytes == 0
    own.allocate(800)


def test_a_gpu_that_others_have_filled_says_so_before_anything_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(ordinal: int) -> Handle:
        raise OutOfDeviceMemoryError("cuDevicePrimaryCtxRetain")

    driver = FakeDriver()
    monkeypatch.setattr(driver, "retain_context", refuse)
    with pytest.raises(BudgetError, match=r"no memory left[^.]*\.\ncuDevicePrimaryCtxRetain found none"):
        resources(driver)


def test_a_gpu_that_has_less_than_the_limit_says_what_is_missing() -> None:
    own = resources(FakeDriver(memory_bytes=1000), 1 << 30)
    own.allocate(600)
    with pytest.raises(BudgetError, match="600 bytes are missing"):
        own.allocate(1000)
    assert own.used_bytes == 600


def test_memory_goes_with_its_last_reference() -> None:
    driver = FakeDriver()
    own = resources(driver)
    memory, pinned = DeviceMemory(own, 300), PinnedMemory(own, 50)
    assert (own.used_bytes, own.pinned_bytes) == (512, 50)
    pinned.bytes[:] = 7
    del memory, pinned
    gc.collect()
    assert (own.used_bytes, own.pinned_bytes) == (0, 0)
    assert not driver.blocks
    assert not driver.alive["pinned"]


def test_close_gives_everything_back_once() -> None:
    driver = FakeDriver()
    own = resources(driver)
    memory, pinned = DeviceMemory(own, 300), PinnedMemory(own, 50)
    own.stream()
    own.event()
    graph = driver.end_capture(own.stream())
    own.keep_graph(graph)
    own.close()
    own.close()
    own.drop_graph(graph)
    del memory, pinned
    assert not driver.blocks
    assert not any(driver.alive.values())
    assert driver.log.count("destroy_graph") == 1
    with pytest.raises(DeviceError, match="closed"):
        own.enter()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("name", "take"),
    [
        ("allocate", lambda own: own.allocate(300)),
        ("allocate_pinned", lambda own: own.pin(300)),
        ("register", lambda own: own.register(4096, 300)),
        ("create_stream", lambda own: own.stream()),
        ("create_event", lambda own: own.event()),
    ],
)
def test_ctrl_c_loses_nothing_of_what_the_driver_was_just_giving(
    monkeypatch: pytest.MonkeyPatch, name: str, take: Callable[[Resources], None]
) -> None:
    """Python raises it when the driver's call returns, which for much pinned memory is after seconds."""
    driver = FakeDriver()
    own = resources(driver)
    own.stream()
    own.pin(100)
    call = getattr(driver, name)

    def interrupted(*arguments: Any) -> Any:
        result = call(*arguments)
        signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(driver, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            take(own)
    own.close()
    assert not driver.blocks
    assert not any(driver.alive.values())


def test_a_forked_process_leaves_everything_to_the_one_that_took_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    own = resources(driver)
    memory = DeviceMemory(own, 300)
    own.at_close(lambda: driver.log.append("action"))
    driver.log.clear()
    with monkeypatch.context() as forked:
        forked.setattr("os.getpid", lambda: -1)
        del memory
        own.close()
    assert driver.log == []
    own.close()
    assert driver.log[0] == "action"


def test_a_broken_gpu_does_not_stop_the_release_of_the_rest() -> None:
    driver = FakeDriver()
    own = resources(driver)
    own.allocate(100)
    own.pin(100)
    own.stream()
    driver.broken = True
    own.close()
    assert own.closed
    assert (own.used_bytes, own.pinned_bytes) == (0, 0)
    assert not driver.alive["stream"]
    assert not driver.alive["context"]
