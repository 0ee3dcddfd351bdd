"""What all tests share."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest

from moec.runtime.devices import measure
from moec.runtime.machine.limits import total_memory
from moec.runtime.machine.threads import usable_cpus
from tests.support import made_once

SEED = os.environ.get("MOEC_TESTS_SEED", "")
"""Another one: every test draws other random numbers."""

hypothesis.settings.register_profile(
    "moec",
    database=None,
    deadline=None,
    derandomize=not SEED,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("moec")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test finds what a run before it, or the user's own, has noted; processes that tests start do not either."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("MOEC_CACHE", folder)
        patch.setenv(made_once.FOLDER, os.environ.get(made_once.FOLDER, str(shared)))
        for name in ("no_proxy", "NO_PROXY"):
            patch.setenv(name, "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="session", autouse=True)
def _brief_measurements() -> Iterator[None]:
    """Host memory is read once where its speed is asked for: no test says how fast it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "PROBE_ROUNDS", 1)
        patch.setattr(measure, "REPEATS", 1)
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background job is begun with SIGINT ignored, and then Python does not raise anything."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if SEED and config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = SEED


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> None:
    """A fixture draws the same random numbers whichever test asks for it first."""
    _seed(f"{fixturedef.baseid}::{fixturedef.argname}[{getattr(request, 'param_index', 0)}]")


def pytest_collection_finish() -> None:
    """What all files have imported stays: looking for garbage among it again and again takes a tenth of all time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """A test draws the same random numbers whichever tests its process ran before."""
    _seed(item.nodeid)


def _seed(name: str) -> None:
    seed = zlib.crc32(f"{name}{SEED}".encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    if "torch" in sys.modules:  # one that is not loaded yet begins with a seed of its own, always the same
        sys.modules["torch"].manual_seed(seed)


WORKER_BYTES = 2 << 30
"""What a process of xdist takes at most, with a process that one of its tests has started."""


def pytest_xdist_auto_num_workers() -> int | None:
    """One a CPU, as far as memory goes; xdist would also count CPUs that the process's cgroup does not let it use."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    return min(usable_cpus(), max(2, total_memory() // WORKER_BYTES))


LONGEST = "test_emulated_gpu.py"
"""Takes minutes in one process: begun last, it would keep one processor busy while the others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test."""
    items.sort(key=lambda item: LONGEST not in item.nodeid)
