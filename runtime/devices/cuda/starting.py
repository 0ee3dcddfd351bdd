"""Starting a GPU beside other work: the driver takes 0.1 s to start and as much again for a GPU's context."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from moec.runtime.devices.cuda.device import CudaDevice, check_ordinal, tvm_stream
from moec.runtime.devices.cuda.nvidia import NvidiaDriver

if TYPE_CHECKING:
    from collections.abc import Iterator


class StartingDevice:
    """A GPU that a thread is starting."""

    def __init__(self, future: Future[CudaDevice]) -> None:
        self._future = future

    def device(self) -> CudaDevice:
        """Wait for it.

        Raises:
            MissingDependencyError: cuda-bindings is not installed.
            DeviceError: there is no such GPU, or it does not start.
        """
        return self._future.result()


@contextlib.contextmanager
def start_device(ordinal: int) -> Iterator[StartingDevice]:
    """Start a GPU in a thread; if the block fails, the device is closed, once it has started."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(_start, ordinal)
    try:
        yield StartingDevice(future)
    except BaseException:
        if future.exception() is None:
            future.result().close()
        raise
    finally:
        pool.shutdown()


def _start(ordinal: int) -> CudaDevice:
    driver = NvidiaDriver()
    check_ordinal(driver, ordinal)
    return CudaDevice(driver, ordinal, tvm_stream)
