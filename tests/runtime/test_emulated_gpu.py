"""Starts tests/emulated_gpu in a process of its own: the stub of the CUDA driver stays loaded where it was loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.driver")


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="the stub is compiled with g++")


FOLDER = Path(__file__).parents[1] / "emulated_gpu"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
HANGS_SECONDS = 240
"""A test that takes longer shows where all of its threads are."""


@pytest.fixture
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of one run of tests share."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "stub-bundles"


@NEEDS_COMPILER
@pytest.mark.parametrize("name", FILES)
def test_the_runtime_on_a_stub_of_the_cuda_driver(name: str, bundles: Path) -> None:
    run(name, "not slow", bundles)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_what_takes_longer_on_a_stub_of_the_cuda_driver(name: str, bundles: Path) -> None:
    run(name, "slow", bundles)


def run(name: str, marked: str, bundles: Path) -> None:
    """A process for each file: what one leaves running must not hold up another."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", f"faulthandler_timeout={HANGS_SECONDS}"]
    command = [sys.executable, "-m", "pytest", *options, "-m", marked, str(FOLDER / name)]
    environment = {
        **os.environ,
        "MOEC_CUDA_STUB": "1",
        "MOEC_STUB_BUNDLES": str(bundles),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTEST_ADDOPTS", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    nothing_marked = 5
    assert result.returncode in (0, nothing_marked), result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout or result.returncode == nothing_marked
