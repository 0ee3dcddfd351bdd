"""This machine's speeds, measured, as a `MachineRecord` for the scheduler."""

from __future__ import annotations

import itertools
import os
import platform
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.machine import MachineRecord
from moec.artifacts.sharing import MAILBOX_US, TEAM_US
from moec.runtime.devices.cuda.measure import (
    FED_LINK_EFFICIENCY,
    GPU_EFFICIENCY,
    LAYER_US,
    LINK_EFFICIENCY,
    measure_gpu,
)
from moec.runtime.devices.names import parse_ordinal
from moec.runtime.machine.limits import available_memory, total_memory
from moec.runtime.machine.threads import default_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.artifacts.sharing import TeamSpeed
    from moec.runtime.devices.cuda.measure import GpuRecord

PROBE_BYTES = 1 << 30
"""Large enough to leave every cache level behind: 256 MB came to 185 GB/s on a host whose memory gives 95 to 127."""
PROBE_SHARE = 8
"""Of the available memory, one part in so many at most."""
PROBE_ROUNDS = 2
"""Of reading it in one go: threads start some 0.1 ms after each other, which would be a part of what they take."""
DISK_PROBE_BYTES = 64 << 20
REPEATS = 5
GIGA = 1e9
HOST_EFFICIENCY = 1.0
"""Of the CPU's experts where none were measured."""


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def read_bandwidth(threads: int, probe_bytes: int = PROBE_BYTES) -> float:
    """GB/s at which ``threads`` threads read host memory together, the best of some tries.

    Of one round of 256 MB each, tries on an H200's host came to 85 to 123 in one process.
    """
    words = np.ones(min(probe_bytes, available_memory() // PROBE_SHARE) // 8, dtype=np.int64)
    parts = np.array_split(words, threads)

    def read(part: NDArray[np.int64]) -> None:
        for _ in range(PROBE_ROUNDS):
            np.max(part)

    rates: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.max, parts))
        for _ in range(REPEATS):
            start = time.perf_counter()
            list(pool.map(read, parts))
            rates.append(PROBE_ROUNDS * words.nbytes / (time.perf_counter() - start) / GIGA)
    return max(rates)


def disk_bandwidth(folder: Path) -> float:
    """GB/s at which a file just written in ``folder`` is read back, its pages dropped from the cache first."""
    block = os.urandom(DISK_PROBE_BYTES)
    # Without a name: a bundle with a file more is damaged, for who loads it now or after this was killed.
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        while os.read(file.fileno(), 8 << 20):
            pass
        return DISK_PROBE_BYTES / (time.perf_counter() - start) / GIGA


def gpu_records() -> list[GpuRecord]:
    """Measure every GPU that this process may use.

    Raises:
        DeviceError: there is no driver.
        MissingDependencyError: cuda-bindings is not installed.
    """
    from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver

    driver = NvidiaDriver()
    return [measure_gpu(driver, ordinal) for ordinal in range(driver.device_count())]


def gpu_peers() -> list[tuple[int, int]]:
    """Pairs of GPUs that read each other's memory without a detour through the host's; raises as `gpu_records`."""
    from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver

    driver = NvidiaDriver()
    pairs = itertools.combinations(range(driver.device_count()), 2)
    return [pair for pair in pairs if driver.can_reach(*pair) and driver.can_reach(*reversed(pair))]


def gpu_record(device: str) -> GpuRecord:
    """Measure one GPU, such as ``cuda:0``; raises as `gpu_records` does, or where there is no such GPU."""
    from moec.runtime.devices.cuda.device import check_ordinal
    from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver

    driver, ordinal = NvidiaDriver(), parse_ordinal(device)
    check_ordinal(driver, ordinal)
    return measure_gpu(driver, ordinal)


def this_machine(
    folder: Path,
    threads: int | None = None,
    gpu: GpuRecord | None = None,
    team: TeamSpeed | None = None,
    *,
    fed: bool = False,
) -> MachineRecord:
    """Measure this machine.

    Args:
        folder: on the disk where bundles lie.
        threads: of the CPU.
        gpu: one measured already.
        team: how fast the CPU computes experts beside a GPU, measured already.
        fed: a thread of the CPU feeds the GPU's copy engine.
    """
    efficiency = FED_LINK_EFFICIENCY if fed else LINK_EFFICIENCY
    threads = threads or default_threads()
    bandwidth = read_bandwidth(threads)
    start_us = TEAM_US if team is None else team.start_us
    return MachineRecord(
        name=platform.node() or "this machine",
        gpu_name=None if gpu is None else gpu.name,
        gpu_memory_bytes=0 if gpu is None else gpu.memory_bytes,
        gpu_bandwidth_gb_s=0.0 if gpu is None else round(gpu.bandwidth_gb_s, 1),
        gpu_efficiency=1.0 if gpu is None else GPU_EFFICIENCY,
        gpu_tflops=0.0 if gpu is None else round(gpu.tflops, 1),
        layer_us=0.0 if gpu is None else LAYER_US,
        link_gb_s=0.0 if gpu is None else round(gpu.link_gb_s, 2),
        link_efficiency=1.0 if gpu is None else efficiency,
        unified_memory=gpu is not None and gpu.unified_memory,
        host_memory_bytes=total_memory(),
        host_bandwidth_gb_s=round(bandwidth, 2),
        host_efficiency=HOST_EFFICIENCY if team is None else round(team.gb_s / bandwidth, 3),
        cpu_threads=threads,
        disk_gb_s=round(disk_bandwidth(folder), 2),
        handshake_us=0.0 if gpu is None else round(MAILBOX_US + start_us, 1),
        source=f"measured by moec on {cpu_model()}" + ("" if gpu is None else f" and {gpu.name}"),
    )
