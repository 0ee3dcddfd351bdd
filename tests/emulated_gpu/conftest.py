"""Tests that run in a process of their own, with the stub of tests/support/cuda_stub in place of NVIDIA's libraries."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from moec.compiler.lowering import cuda_module
from moec.runtime.devices.cuda.device import CudaDevice
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
from moec.runtime.devices.cuda.modules.libraries import load_cuda_libraries
from moec.runtime.machine.libraries import load_runtime
from tests.support.compiling import compile_checkpoint
from tests.support.cuda_stub import Stub, write_image
from tests.support.tiny_models import save

collect_ignore_glob = [] if os.environ.get("MOEC_CUDA_STUB") else ["test_*.py"]
"""tests/runtime/test_emulated_gpu.py starts the process that these run in."""


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    stub = Stub(tmp_path_factory.mktemp("stub"))
    load_runtime(1)
    load_cuda_libraries()
    return stub


@pytest.fixture
def device(stub: Stub) -> Iterator[CudaDevice]:
    """One whose every resource must be given back at the end."""
    device = CudaDevice(NvidiaDriver(), 0)
    device.open(64 << 20, 1 << 16)
    yield device
    device.close()
    counts = stub.counts()
    alive = (counts.device_blocks, counts.pinned_blocks, counts.streams, counts.events, counts.graphs)
    assert alive == (0, 0, 0, 0, 0)


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("modules")


@pytest.fixture(scope="session")
def bundles(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bundles of float32 weights with code for the CPU, and for the emulator where a GPU's would be."""

    @cache
    def compiled(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        save(name, folder / "checkpoint")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_module, "_machine_code", lambda source, target: source)
            patch.setattr(cuda_module, "write_fatbin", write_image)
            compile_checkpoint(
                folder / "checkpoint", folder / "model.moec", dtype="f32", targets=("cpu", "cuda-sm_90")
            )
        return folder / "model.moec"

    return compiled
