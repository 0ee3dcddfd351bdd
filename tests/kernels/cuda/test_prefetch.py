"""The kernel that prefetches weights: in the emulator every range is checked and touched at both ends."""

from __future__ import annotations

import numpy as np

from moec.artifacts.prefetch import RANGES
from moec.compiler.kernels.cuda.prefetch import prefetch
from moec.runtime.tensors import aligned_empty
from tests.support.cuda_emulator import Emulated


def run(ranges: list[tuple[int, int]]) -> None:
    table = aligned_empty((RANGES, 2), "int64")
    table[...] = 0
    table[: len(ranges)] = ranges
    Emulated(prefetch())("prefetch", table)


def test_ranges_of_any_size_stay_inside() -> None:
    memory = np.zeros(1 << 20, np.uint8)
    start = -(-memory.ctypes.data // 64) * 64
    run([(start, 16), (start + 64, 128), (start + 1024, 65536 + 48), (start + 80_000, 900_000 // 16 * 16)])
