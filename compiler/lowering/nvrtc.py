"""CUDA source to machine code with NVRTC from the package index: no toolkit, no host compiler, no GPU, no driver."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from moec.errors import CompileError, MissingDependencyError

OPTIONS = ("--std=c++17", "-default-device", "--disable-warnings")


def compile_cubin(source: str, architecture: str) -> bytes:
    """Machine code of ``source`` for ``architecture``, e.g. ``sm_89``.

    Raises:
        CompileError: the source does not compile; the message has the log.
        MissingDependencyError: NVRTC or the CUDA headers are not installed.
    """
    return _compile(source, architecture, "CUBIN")


def compile_ptx(source: str, architecture: str) -> bytes:
    """PTX of ``source``, from which a driver makes code for an architecture newer than ``architecture``."""
    return _compile(source, architecture.replace("sm_", "compute_"), "PTX")


def cuda_root() -> Path:
    """The folder that NVIDIA's packages share.

    Raises:
        MissingDependencyError: a piece is not installed.
    """
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        root = Path(place) / "cu13"
        library = root / "lib" / "libnvrtc.so.13"
        if library.exists() and (root / "include" / "cuda_fp16.h").exists():
            return root
    raise MissingDependencyError(
        "Compiling for CUDA needs NVRTC and the CUDA headers.",
        "nvidia-cuda-nvrtc, nvidia-cuda-runtime or nvidia-cuda-cccl is not installed.",
        "pip install 'moec[compile]', or compile for the CPU alone: --target cpu",
    )


@cache
def _library(root: Path) -> Any:
    # NVRTC opens these by their bare name, which some of its versions find only where they are loaded already.
    for builtins in (root / "lib").glob("libnvrtc-builtins.so.13*"):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(root / "lib" / "libnvrtc.so.13"))


def _compile(source: str, architecture: str, kind: str) -> bytes:
    root = cuda_root()
    nvrtc = _library(root)
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        includes = [root / "include", root / "include" / "cccl"]
        options = [f"--gpu-architecture={architecture}", *OPTIONS, *(f"-I{folder}" for folder in includes)]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), array) != 0:
            log = _read(nvrtc, program, "ProgramLog").decode(errors="replace")
            raise CompileError(
                f"NVRTC failed for {architecture}",
                log.strip()[-2000:],
                "This is a bug in moec: please report it.",
            )
        return _read(nvrtc, program, kind)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw
