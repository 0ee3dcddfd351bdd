"""Starts tests/emulated_gpu in a process of its own: the stub of the CUDA driver stays loaded where it was loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("cuda.bindings.driver")


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="the stub is compiled with g++")


@NEEDS_COMPILER
def test_the_runtime_on_a_stub_of_the_cuda_driver() -> None:
    run("not slow")


@NEEDS_COMPILER
@pytest.mark.slow
def test_what_takes_longer_on_a_stub_of_the_cuda_driver() -> None:
    run("slow")


def run(marked: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marked]
    environment = {**os.environ, "MOEC_CUDA_STUB": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    result = subprocess.run([*command, "tests/emulated_gpu"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
