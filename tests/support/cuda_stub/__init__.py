"""A CUDA driver and runtime for machines without a GPU.

TVM's CUDA library and cuda-bindings are the real ones; kernels run in the emulator (tests/support/cuda_emulator).
Loading the stub is for the whole process: tests that need it run in one of their own. NVIDIA's runtime is loaded too,
by a torch that was made for CUDA if by nobody else; whose functions are called is a matter of who was there first.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import NamedTuple

from moec.runtime.devices.cuda.modules import libraries

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
    """The two libraries, built into ``folder`` and loaded before NVIDIA's: nothing may have imported torch."""

    def __init__(self, folder: Path) -> None:
        include = libraries.package_file("nvidia", "cu13/include")
        assert include is not None, "the stub needs the headers of nvidia-cuda-runtime"
        versions = folder / "versions"
        versions.write_text(f"{CUDART} {{ global: *; }};\n")
        self._cuda = _build(folder / "libcuda.so.1", "cuda.cpp", include, "-ldl")
        _build(folder / "libcudart_stub.so", "cudart.cpp", include, f"-Wl,--version-script={versions}")

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
