"""A CUDA driver and runtime for machines without a GPU, and bundles' modules made to run on them.

TVM's CUDA library and cuda-bindings are the real ones; kernels run in the emulator (tests/support/cuda_emulator).
Loading the stub is for the whole process: tests that need it run in one of their own.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import NamedTuple

from moec.runtime.devices.cuda.modules import libraries
from tests.support.cuda_emulator import compile_kernels

FOLDER = Path(__file__).parent
CUDART = "libcudart.so.13"
GLOBAL = ctypes.RTLD_GLOBAL


class Counts(NamedTuple):
    """What the stub's driver has alive, and what it has done."""

    device_bytes: int
    device_blocks: int
    pinned_blocks: int
    streams: int
    events: int
    graphs: int
    modules: int
    launches: int
    copies: int
    contexts: int


class Stub:
    """The two libraries, built into ``folder`` and loaded in place of NVIDIA's."""

    def __init__(self, folder: Path) -> None:
        include = libraries.package_file("nvidia", "cu13/include")
        assert include is not None, "the stub needs the headers of nvidia-cuda-runtime"
        versions = folder / "versions"
        versions.write_text(f"{CUDART} {{ global: *; }};\n")
        self._cuda = _build(folder / "libcuda.so.1", "cuda.cpp", include, "-ldl")
        _build(folder / CUDART, "cudart.cpp", include, f"-Wl,--version-script={versions}")
        libraries._cudart = lambda: str(folder / CUDART)

    def counts(self) -> Counts:
        """See `Counts`."""
        numbers = (ctypes.c_int64 * 10)()
        self._cuda.stub_counts(numbers)
        return Counts(*numbers)


def _build(path: Path, source: str, include: Path, *options: str) -> ctypes.CDLL:
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{include}", str(FOLDER / source)]
    named = f"-Wl,-soname,{path.name}"
    result = subprocess.run([*command, named, *options, "-o", str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return ctypes.CDLL(str(path), GLOBAL)


def write_image(path: Path, source: str) -> None:
    """Write what stands for a fat binary made of ``source``: where the emulator's library is, which runs often."""
    path.write_bytes(str(compile_kernels(source, "-O1")).encode() + b"\0")
