"""What host memory gives where the CPU's threads read it while the link brings it to the GPU."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.runtime.devices.cuda.driver.memory import DeviceMemory, PinnedMemory
from moec.runtime.devices.cuda.driver.resources import Resources

if TYPE_CHECKING:
    from moec.runtime.devices.cuda.driver.functions import Driver

COPY_BYTES = 256 << 20
COPIES = 32
"""Some 0.15 s over a link of 55 GB/s."""
READ_BYTES = 1 << 30
CHUNK_BYTES = 8 << 20
"""That a thread reads between two looks at whether the copies are over."""
GIGA = 1e9


@dataclass(frozen=True)
class HostSpeeds:
    """Bytes of host memory in a second, in GB/s, of both at once."""

    link: float
    read: float

    @property
    def together(self) -> float:
        """Of the link and the threads."""
        return self.link + self.read


def read_beside_link(driver: Driver, ordinal: int, threads: int) -> HostSpeeds:
    """How fast ``threads`` threads read host memory while the copy engine of a GPU does, and how fast it is meanwhile.

    Takes 0.5 GB of device memory and pinned memory and 1 GB of host memory, all of which is given back.
    """
    resources = Resources(driver, ordinal)
    try:
        resources.limit_bytes = COPY_BYTES
        stream, end = resources.stream(), resources.event()
        device, host = DeviceMemory(resources, COPY_BYTES), PinnedMemory(resources, COPY_BYTES)
        words = np.ones(READ_BYTES // 8, dtype=np.int64)
        over = threading.Event()

        def read(part: np.ndarray[tuple[int], np.dtype[np.int64]]) -> int:
            chunks = np.array_split(part, max(1, part.nbytes // CHUNK_BYTES))
            size = 0
            while True:
                for chunk in chunks:
                    if over.is_set():
                        return size
                    np.max(chunk)
                    size += chunk.nbytes

        with ThreadPoolExecutor(threads) as pool:
            reading = [pool.submit(read, part) for part in np.array_split(words, threads)]
            start = time.perf_counter()
            for _ in range(COPIES):
                driver.copy_in(device.address, host.address, COPY_BYTES, stream)
            driver.record(end, stream)
            driver.wait(end)
            seconds = time.perf_counter() - start
            over.set()
            size = sum(each.result() for each in reading)
        return HostSpeeds(COPIES * COPY_BYTES / seconds / GIGA, size / seconds / GIGA)
    finally:
        resources.close()
