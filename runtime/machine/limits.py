"""How much memory and how many CPUs this machine has, as far as this process may use them."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def total_memory() -> int:
    """Bytes of physical memory, or of the process's cgroup where that is less."""
    return min(_meminfo("MemTotal"), _cgroup("memory.max") or 1 << 62)


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    free = _meminfo("MemAvailable")
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return free if limit is None or used is None else max(0, min(free, limit - used))


def cpu_quota() -> int | None:
    """Whole CPUs that the process's cgroup may use, rounded up; ``None`` where there is no limit."""
    try:
        quota, _, period = (_CGROUP / "cpu.max").read_text().partition(" ")
    except OSError:
        return None
    return -(-int(quota) // int(period)) if quota.isdigit() else None


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/meminfo has no {key}")


def _cgroup(name: str) -> int | None:
    """A figure of the process's cgroup; ``None`` where there is no limit, or no version 2 hierarchy."""
    try:
        text = (_CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
