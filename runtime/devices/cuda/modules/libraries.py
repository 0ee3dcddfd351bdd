"""TVM's CUDA library and the CUDA runtime that it wants, loaded by path; no Python package of either is imported."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from moec.errors import DeviceError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator

CUDART = "libcudart.so.13"
TVM_CUDA = "libtvm_runtime_cuda.so"

_loaded: list[ctypes.CDLL] = []


def load_cuda_libraries() -> None:
    """Load both into the process, once; TVM's runtime library is there already.

    Raises:
        MissingDependencyError: one of them is not installed.
        DeviceError: one of them does not load.
    """
    if _loaded:
        return
    runtime, cuda = _cudart(), package_file("tvm", f"lib/{TVM_CUDA}")
    if cuda is None:
        raise MissingDependencyError(
            f"{TVM_CUDA} was not found.",
            "The package apache-tvm is not installed completely.",
            "Install it again: pip install --force-reinstall apache-tvm==0.27.0.post1",
        )
    try:
        _loaded.extend(ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in (runtime, cuda))
    except OSError as error:
        raise DeviceError(
            "TVM's CUDA library does not load.", f"{error}.", "Install NVIDIA's driver (580 or newer)."
        ) from error


def package_file(package: str, name: str) -> Path | None:
    """A file below an installed package's folder, without importing the package."""
    for folder in _folders(package):
        if (folder / name).exists():
            return folder / name
    return None


def _folders(package: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations is not None:
        yield from map(Path, spec.submodule_search_locations)


def _cudart() -> str:
    """Path of the CUDA runtime in NVIDIA's package, or its bare name where the system has one."""
    path = package_file("nvidia", f"cu13/lib/{CUDART}")
    if path is not None:
        return str(path)
    try:
        ctypes.CDLL(CUDART, ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise MissingDependencyError(
            f"{CUDART} was not found.",
            "It comes with the package nvidia-cuda-runtime.",
            'Install it: pip install "moec[cuda]"',
        ) from error
    return CUDART
