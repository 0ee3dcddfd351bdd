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
FILES = {path.name: path.read_text() for path in sorted(FOLDER.glob("test_*.py"))}
QUICK = [name for name, text in FILES.items() if "\npytestmark = pytest.mark.slow\n" not in text]
SLOW = [name for name, text in FILES.items() if "pytest.mark.slow" in text]
"""A process that finds nothing to do takes seconds too."""
PROCESSES = 2
"""For the quick files: each takes as long to begin as some of them take to run."""
HANGS_SECONDS = 240
"""A test that takes longer shows where all of its threads are."""


@NEEDS_COMPILER
@pytest.mark.parametrize("names", [QUICK[first::PROCESSES] for first in range(PROCESSES)], ids=" ".join)
def test_the_runtime_on_a_stub_of_the_cuda_driver(names: list[str]) -> None:
    run(names, "not slow")


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_what_takes_longer_on_a_stub_of_the_cuda_driver(name: str) -> None:
    run([name], "slow")


def run(names: list[str], marked: str) -> None:
    """Tests of some files in a process of their own."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", f"faulthandler_timeout={HANGS_SECONDS}"]
    files = [str(FOLDER / name) for name in names]
    command = [sys.executable, "-m", "pytest", *options, "-m", marked, *files]
    environment = {**os.environ, "MOEC_CUDA_STUB": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
