"""A GPU's facts and speeds, measured: what `moec doctor` prints and plans are made with."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from moec.runtime.devices.cuda.driver.memory import DeviceMemory, PinnedMemory
from moec.runtime.devices.cuda.driver.resources import Resources
from moec.runtime.devices.cuda.modules.architecture import architecture_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.runtime.devices.cuda.driver.functions import Driver, Handle

COPY_BYTES = 1 << 30
"""Far beyond any cache; less where the GPU has less."""
LINK_BYTES = 256 << 20
QUICK_BYTES = 64 << 20
"""For an answer in milliseconds; a GPU's cache may hold half of it."""
REPEATS = 5
GIGA = 1e9
GPU_EFFICIENCY = 0.92
LINK_EFFICIENCY = 0.92
"""What kernels reach of the copies that are measured here: 2.76 of 3.0 TB/s and 50.5 of 54.7 GB/s on an H100."""
FED_LINK_EFFICIENCY = 0.97
"""What the copy engine reaches of them when a thread of the host feeds it layer by layer: 53.0 to 53.3 of 55.1 GB/s."""
FED_LEAST_BYTES = 4 << 20
"""Of an expert: two of 4.9 MB a layer came 2 % sooner from a fed copy engine, a layer's of 74 KB half as late again."""
LAYER_US = 24.0
"""A layer of DeepSeek-V2-Lite's shape beside its bytes: 20 by 1.80 ms a step of 27 layers on an H200 (4.90 GB of
weights), 27 by what an H100 took with earlier kernels."""
CLOCK_KHZ, MULTIPROCESSORS, INTEGRATED = 13, 16, 18
"""Numbers of the driver's attributes: the highest clock, and whether the GPU shares the host's memory."""
TENSOR_OPERATIONS = {
    (8, 0): 2048,
    (8, 6): 512,
    (8, 7): 2048,
    (8, 9): 512,
    (9, 0): 4096,
    (10, 0): 8192,
    (12, 0): 512,
}
"""By capability: dense 16-bit operations of one multiprocessor and clock, summed in float32. From NVIDIA's published
TFLOP/s over multiprocessors and clock (A100, RTX 3080, AGX Orin, RTX 4090, H100, B200, RTX 5090)."""


@dataclass(frozen=True)
class GpuRecord:
    """One GPU. Speeds in GB/s, where 1 GB is 10^9 bytes."""

    ordinal: int
    name: str
    architecture: str
    driver: str
    """The newest CUDA version that the driver supports."""
    memory_bytes: int
    free_bytes: int
    bandwidth_gb_s: float
    """Of a copy within the GPU's memory, bytes read and bytes written both counted."""
    link_gb_s: float
    """From pinned host memory to the GPU."""
    back_link_gb_s: float
    """From the GPU to pinned host memory."""
    tflops: float
    """Of dense 16-bit products by the GPU's clock, in 10^12 operations a second; 0 where moec does not know them."""
    unified_memory: bool
    """The GPU shares the host's memory."""


class CopySpeeds(NamedTuple):
    """What a model is divided by among several GPUs, in GB/s; see `GpuRecord`."""

    bandwidth_gb_s: float
    link_gb_s: float


def copy_speeds(driver: Driver, ordinal: int, limit_bytes: int) -> CopySpeeds:
    """Measure a GPU in some milliseconds, with less memory than ``limit_bytes``; all of it is given back."""
    resources = Resources(driver, ordinal)
    try:
        resources.limit_bytes = limit_bytes
        stream, size = resources.stream(), min(QUICK_BYTES, limit_bytes // 4)
        near = _within(resources, stream, size)
        host, device = PinnedMemory(resources, size), DeviceMemory(resources, size)
        copy = driver.copy_in
        far = copy_rate(resources, stream, size, lambda: copy(device.address, host.address, size, stream))
        return CopySpeeds(near, far)
    finally:
        resources.close()


def measure_gpu(driver: Driver, ordinal: int) -> GpuRecord:
    """Measure one GPU; takes a second or two, and everything is given back."""
    resources = Resources(driver, ordinal)
    try:
        free, total = driver.memory_info()
        resources.limit_bytes = free
        stream = resources.stream()
        link, back = _link(resources, stream)
        return GpuRecord(
            ordinal,
            driver.device_name(ordinal),
            architecture_name(driver.capability(ordinal)),
            "CUDA {}.{}".format(*driver.version()),
            total,
            free,
            _within(resources, stream, min(COPY_BYTES, free // 4)),
            link,
            back,
            _tflops(driver, ordinal),
            bool(driver.attribute(ordinal, INTEGRATED)),
        )
    finally:
        resources.close()


def _tflops(driver: Driver, ordinal: int) -> float:
    operations = TENSOR_OPERATIONS.get(driver.capability(ordinal), 0)
    clock = driver.attribute(ordinal, CLOCK_KHZ) * driver.attribute(ordinal, MULTIPROCESSORS)
    return operations * clock * 1e3 / 1e12


def _within(resources: Resources, stream: Handle, size: int) -> float:
    source, target = DeviceMemory(resources, size), DeviceMemory(resources, size)
    copy = resources.driver.copy_within
    return 2 * copy_rate(resources, stream, size, lambda: copy(target.address, source.address, size, stream))


def _link(resources: Resources, stream: Handle) -> tuple[float, float]:
    device, host = DeviceMemory(resources, LINK_BYTES), PinnedMemory(resources, LINK_BYTES)
    there, back = resources.driver.copy_in, resources.driver.copy_out
    ahead = copy_rate(
        resources, stream, LINK_BYTES, lambda: there(device.address, host.address, LINK_BYTES, stream)
    )
    behind = copy_rate(
        resources, stream, LINK_BYTES, lambda: back(host.address, device.address, LINK_BYTES, stream)
    )
    return ahead, behind


def copy_rate(resources: Resources, stream: Handle, size: int, copy: Callable[[], None]) -> float:
    """Median GB/s of a copy of ``size`` bytes in ``stream``, by the GPU's own clock; it is made once before."""
    driver = resources.driver
    start, end = resources.event(timed=True), resources.event(timed=True)
    copy()
    rates: list[float] = []
    for _ in range(REPEATS):
        driver.record(start, stream)
        copy()
        driver.record(end, stream)
        driver.wait(end)
        rates.append(size / driver.milliseconds(start, end) * 1e3 / GIGA)
    return median(rates)
