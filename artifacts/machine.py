"""One machine as the scheduler sees it: sizes and speeds. ``examples/machines/*.json`` hold such records."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MachineRecord:
    """Sizes in bytes; speeds in GB/s, where 1 GB is 10^9 bytes.

    Speeds are what the named source says: published peaks in the shipped examples, measured ones from ``moec
    doctor``.
    """

    name: str
    gpu_name: str | None
    """``None``: no GPU; then ``gpu_memory_bytes``, ``gpu_bandwidth_gb_s`` and ``link_gb_s`` are 0."""
    gpu_memory_bytes: int
    gpu_bandwidth_gb_s: float
    link_gb_s: float
    """Host to device, one direction."""
    unified_memory: bool
    """CPU and GPU share one memory, so splitting work between them gains no bandwidth."""
    host_memory_bytes: int
    host_bandwidth_gb_s: float
    cpu_threads: int
    disk_gb_s: float
    handshake_us: float
    """What it costs a layer when the CPU computes a part of its misses, in microseconds."""
    source: str
    """Where the figures come from."""
