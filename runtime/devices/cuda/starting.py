"""Starting GPUs beside other work: the driver takes 0.1 s to start and as much again for a GPU's context."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from moec.runtime.devices.cuda.device import CudaDevice, check_ordinal, tvm_stream
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class StartingDevices:
    """GPUs that threads are starting."""

    def __init__(self, futures: Sequence[Future[CudaDevice]]) -> None:
        self._futures = futures

    def devices(self) -> list[CudaDevice]:
        """Wait for them, in their order.

        Raises:
            MissingDependencyError: cuda-bindings is not installed.
            DeviceError: there is no such GPU, or it does not start.
        """
        return [future.result() for future in self._futures]


@contextlib.contextmanager
def start_devices(ordinals: Sequence[int]) -> Iterator[StartingDevices]:
    """Start GPUs, each in a thread; if the block fails, they are closed, once they have started."""
    pool = ThreadPoolExecutor(len(ordinals))
    futures = [pool.submit(_start, ordinal) for ordinal in ordinals]
    try:
        yield StartingDevices(futures)
    except BaseException:
        for future in futures:
            if future.exception() is None:
                future.result().close()
        raise
    finally:
        pool.shutdown()


def _start(ordinal: int) -> CudaDevice:
    driver = NvidiaDriver()
    check_ordinal(driver, ordinal)
    return CudaDevice(driver, ordinal, tvm_stream)
