"""The emulator has the device functions that kernels may call, and no others."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from moec.compiler.kernels import cuda
from tests.support.cuda_emulator import HEADER

PRIMITIVES = Path(cuda.__file__).with_name("primitives.cuh")
HOPPER = ("-D__CUDA_ARCH__=900", "-D__CUDA_ARCH_FEAT_SM90_ALL")
RUNS_THEM = "moec_emulate"


def functions(path: Path, *options: str) -> set[str]:
    """Names in a header, those among them that its macros make."""
    command = ["g++", "-E", "-P", *options, "-x", "c++", str(path)]
    source = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\b(moec_\w+) ?\(", source))


def test_every_function_of_kernels_is_emulated() -> None:
    """Some are called by formats that ``make test`` has no kernel of."""
    found = functions(PRIMITIVES, *HOPPER)
    assert found
    assert functions(HEADER) - {RUNS_THEM} == found
