"""One machine as the scheduler sees it: sizes and speeds. ``examples/machines/*.json`` hold such records."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MachineRecord:
    """Sizes in bytes; speeds in GB/s, where 1 GB is 10^9 bytes.

    Speeds are what the named source says: published peaks in the shipped examples, measured ones from ``moec
    plan``.
    """

    name: str
    gpu_name: str | None
    """``None``: no GPU; then ``gpu_memory_bytes``, ``gpu_bandwidth_gb_s``, ``gpu_tflops`` and ``link_gb_s`` are 0."""
    gpu_memory_bytes: int
    gpu_bandwidth_gb_s: float
    """Of its memory."""
    gpu_efficiency: float
    """Share of ``gpu_bandwidth_gb_s`` that moec's kernels reach."""
    gpu_tflops: float
    """Dense products of 16-bit numbers on tensor cores, accumulated in float32: 10^12 operations a second."""
    layer_us: float
    """What a layer costs the GPU beside its bytes (launches, tables, eviction), in microseconds."""
    link_gb_s: float
    """Host to device, one direction."""
    link_efficiency: float
    """Share of ``link_gb_s`` at which missing experts come: by kernels that read host memory, or a fed copy engine."""
    unified_memory: bool
    """CPU and GPU share one memory, so splitting work between them gains no bandwidth."""
    host_memory_bytes: int
    host_bandwidth_gb_s: float
    host_efficiency: float
    """Share of ``host_bandwidth_gb_s`` that experts computed by the CPU reach."""
    cpu_threads: int
    disk_gb_s: float
    handshake_us: float
    """What it costs a layer when the CPU computes a part of its misses, in microseconds."""
    source: str
    """Where the figures come from."""
