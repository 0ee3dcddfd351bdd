"""How fast weights are quantized, on one core and on all, and how large the error is. Needs numpy alone.

    python -m benchmarks.rounding

writes ``benchmarks/results/rounding-<cores>.json``. Threads take matrices of 16 MiB in turn, as packing does; speeds
are of bfloat16 values, the checkpoint's.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.random_weights.values import all_cores
from benchmarks.support.common import print_rows, write_result
from moec.formats import FORMATS, METHODS, dequantize, pack_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.formats import Format, Method

ROWS, COLUMNS = 2048, 4096
CHECKPOINT_BYTES = 2
"""Of a value."""
NAMES = ("int8-g128", "int4-g32", "int4-g128", "int4-g32-z", "fp8-e4m3", "mxfp4")


def values() -> NDArray[np.float32]:
    """A matrix with the tails that trained weights have: Student's t with six degrees of freedom."""
    return (np.random.default_rng(0).standard_t(6, (ROWS, COLUMNS)) * 0.02).astype(np.float32)


def speed(kind: Format, method: Method, matrix: NDArray[np.float32], threads: int, matrices: int) -> float:
    """Bytes of the checkpoint that so many threads quantize and pack in a second."""

    def one(_: int) -> None:
        pack_rows(kind, method(kind, matrix))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(threads)))
        start = time.perf_counter()
        list(pool.map(one, range(matrices)))
        return matrices * matrix.size * CHECKPOINT_BYTES / (time.perf_counter() - start)


def measure(name: str, method: str, matrix: NDArray[np.float32]) -> dict[str, Any]:
    """Speed and error of a format."""
    kind, function, cores = FORMATS[name], METHODS[method], all_cores()
    alone = speed(kind, function, matrix, 1, 2)
    together = speed(kind, function, matrix, cores, 4 * cores)
    difference = dequantize(kind, function(kind, matrix)) - matrix
    return {
        "format": name,
        "method": method,
        "GB/s of one core": alone / 1e9,
        "GB/s of all": together / 1e9,
        "times one core": together / alone,
        "relative error": float(np.sqrt(np.square(difference).sum() / np.square(matrix).sum())),
    }


def main() -> None:
    """Measure all formats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=sorted(METHODS), default="nearest")
    options = parser.parse_args()
    matrix = values()
    rows = [measure(name, options.method, matrix) for name in NAMES]
    path = write_result(f"rounding-{all_cores()}", rows, cores=all_cores())
    print_rows(rows)
    print(path)


if __name__ == "__main__":
    main()
