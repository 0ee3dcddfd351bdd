"""How much memory and how many CPUs this machine has, as far as this process may use them."""

from __future__ import annotations

from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")
_UNIFIED = "0::"
"""Before the process's place in the hierarchy of version 2."""


def total_memory() -> int:
    """Bytes of physical memory, or of a cgroup of the process where that is less."""
    return min([_meminfo("MemTotal"), *_of_cgroups("memory.max")])


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    rooms = (_room(folder) for folder in _cgroups())
    return max(0, min([_meminfo("MemAvailable"), *(room for room in rooms if room is not None)]))


def cpu_quota() -> int | None:
    """Whole CPUs that the process's cgroups may use, rounded up; ``None`` where there is no limit."""
    quotas: list[int] = []
    for folder in _cgroups():
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdecimal():
            quotas.append(-(-int(quota) // int(period)))
    return min(quotas, default=None)


def _cgroups() -> list[Path]:
    """The process's cgroup and those around it, as far as it sees them: the limits of all apply to it."""
    lines = _text(_OWN).splitlines()
    own = next((line.removeprefix(_UNIFIED) for line in lines if line.startswith(_UNIFIED)), "/")
    names = [name for name in own.split("/") if name]
    return [_CGROUPS.joinpath(*names[:count]) for count in range(len(names) + 1) if ".." not in names[:count]]


def _of_cgroups(name: str) -> list[int]:
    """A figure of each that has it."""
    found = (_number(_text(folder / name)) for folder in _cgroups())
    return [number for number in found if number is not None]


def _room(folder: Path) -> int | None:
    """What a cgroup's limit leaves; ``None`` where it has none.

    Files that were read are in its memory too, and go as soon as it is wanted, as in ``MemAvailable``.
    """
    limit, used = (_number(_text(folder / name)) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return None
    stat = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
    return limit - used + sum(int(stat.get(name, 0)) for name in ("active_file", "inactive_file"))


def _meminfo(key: str) -> int:
    for line in _text(_MEMINFO).splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{_MEMINFO} has no {key}")


def _number(text: str) -> int | None:
    """``None`` for ``max``, which is no limit, and for nothing."""
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """What a file says; nothing where it is not there: a hierarchy of version 1, or none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
