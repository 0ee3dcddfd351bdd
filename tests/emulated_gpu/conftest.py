"""Tests that run in a process of their own, with the stub of tests/support/cuda_stub in place of NVIDIA's libraries.

Nothing that is imported here imports torch, which the stub has to precede.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from moec.runtime.devices.cuda import measure
from moec.runtime.devices.cuda.device import CudaDevice
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
from moec.runtime.devices.cuda.modules.libraries import load_cuda_libraries
from moec.runtime.machine.libraries import load_runtime
from tests.support.cuda_stub import Stub

collect_ignore_glob = [] if os.environ.get("MOEC_CUDA_STUB") else ["test_*.py"]
"""tests/runtime/test_emulated_gpu.py starts the process that these run in."""
STUB = pytest.StashKey[Stub]()


def pytest_sessionstart(session: pytest.Session) -> None:
    if not collect_ignore_glob:
        folder = tempfile.TemporaryDirectory()
        session.config.add_cleanup(folder.cleanup)
        session.stash[STUB] = Stub(Path(folder.name))


@pytest.fixture(scope="session")
def stub(request: pytest.FixtureRequest) -> Stub:
    load_runtime(1)
    load_cuda_libraries()
    return request.session.stash[STUB]


@pytest.fixture(scope="session", autouse=True)
def _small_measurements() -> Iterator[None]:
    """What a GPU's speeds are measured with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "COPY_BYTES", 1 << 20)
        patch.setattr(measure, "LINK_BYTES", 1 << 20)
        yield


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
    import torch

    from tests.support.emulated_models import compiled

    return cache(lambda name: compiled(tmp_path_factory.mktemp(name), "f32", torch.float32, name))
