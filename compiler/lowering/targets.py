"""The targets a module can be compiled for, and what a machine needs to run each."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moec.errors import UsageError

CPU_LEVELS: dict[str, tuple[str, ...]] = {
    "x86-64-v2": ("cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"),
    "x86-64-v3": ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"),
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "x86-64-v4-vnni": ("avx512_vnni",),
    "x86-64-v4-bf16": ("avx512_bf16",),
}
"""The x86-64 psABI's levels as LLVM names them, with the ``/proc/cpuinfo`` flags that each adds to the one before.

The last two are ours, with an instruction more each: one adds up products of integers of 16 bits (Cascade Lake, Zen 4
and later), one products of bfloat16 (Cooper Lake, Sapphire Rapids, Zen 4 and later).
"""

CPU_LANES = {
    "generic": 4,
    "x86-64-v2": 4,
    "x86-64-v3": 8,
    "x86-64-v4": 16,
    "x86-64-v4-vnni": 16,
    "x86-64-v4-bf16": 16,
}
"""float32 values in one vector register."""

CUDA_ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
"""Machine code for each of these goes into a ``cuda`` module, and PTX of the newest for what comes after."""

TARGET_NAMES = (
    "cpu",
    "cpu-x86-64-v3",
    "cpu-x86-64-v4",
    "cpu-x86-64-v4-vnni",
    "cpu-x86-64-v4-bf16",
    "cuda",
    *(f"cuda-{name}" for name in CUDA_ARCHITECTURES),
)


@dataclass(frozen=True)
class Target:
    """One target of ``moec compile --target``."""

    name: str
    """As written on the command line, and the folder under ``modules/``."""
    kind: Literal["cpu", "cuda"]
    mcpu: str
    """The instruction set of the code that runs on the host, by its name in ``CPU_LEVELS`` or LLVM's."""
    machine: str
    """Machine type of the host code, as ``uname -m`` says it."""
    lanes: int
    """float32 values in one vector register of the host code."""
    cpu_features: tuple[str, ...]
    """Flags of ``/proc/cpuinfo`` that the host code may use: a machine without one of them must refuse it."""
    architectures: tuple[str, ...]
    """CUDA architectures with machine code inside; empty for the CPU."""


def parse_target(name: str) -> Target:
    """The target called ``name``; ``cpu`` is the best instruction set that this machine has.

    Raises:
        UsageError: there is no such target.
    """
    if name not in TARGET_NAMES:
        raise UsageError(
            f"There is no target {name!r}.",
            "A target is a CPU instruction set or a CUDA architecture that moec has kernels for.",
            f"Choose from: {', '.join(TARGET_NAMES)}",
        )
    if name == "cpu":
        return _cpu(name, host_level(_host_flags(), platform.machine()), platform.machine())
    if name.startswith("cpu-"):
        return _cpu(name, name.removeprefix("cpu-"), "x86_64")
    architectures = CUDA_ARCHITECTURES if name == "cuda" else (name.removeprefix("cuda-"),)
    machine = platform.machine()
    mcpu = "x86-64-v3" if machine == "x86_64" else "generic"
    return Target(name, "cuda", mcpu, machine, CPU_LANES[mcpu], required_flags(mcpu), architectures)


def host_level(flags: frozenset[str], machine: str) -> str:
    """The highest level whose flags, and those of the levels below it, are all in ``flags``."""
    level = "generic"
    if machine != "x86_64":
        return level
    for candidate, needed in CPU_LEVELS.items():
        if not flags.issuperset(needed):
            break
        level = candidate
    return level


def required_flags(level: str) -> tuple[str, ...]:
    """All ``/proc/cpuinfo`` flags that code for ``level`` may use; none for ``generic``."""
    levels = list(CPU_LEVELS)
    below = levels[: levels.index(level) + 1] if level in levels else []
    return tuple(flag for name in below for flag in CPU_LEVELS[name])


def _cpu(name: str, mcpu: str, machine: str) -> Target:
    return Target(name, "cpu", mcpu, machine, CPU_LANES[mcpu], required_flags(mcpu), ())


def _host_flags() -> frozenset[str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return frozenset()
    for line in path.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
