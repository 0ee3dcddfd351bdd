"""Random weights in any format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.formats import Quantized

if TYPE_CHECKING:
    from moec.formats import Format


def random_quantized(kind: Format, rows: int, columns: int, seed: int) -> Quantized:
    """Every code that is a number, scales and minima of both signs where the format has such, all zero points."""
    generator = np.random.default_rng(seed)
    groups = -(-columns // kind.group)
    codes = generator.integers(0, 1 << kind.bits, (rows, columns)).astype(np.uint8)
    if kind.codes == "int8":
        codes = generator.integers(-128, 128, (rows, columns)).astype(np.int8)
    elif kind.codes == "e4m3":
        codes[codes & 127 == 127] = 0
    if kind.scale == "e8m0":
        scales = generator.integers(115, 123, (rows, groups)).astype(np.uint8)
    else:
        scales = generator.normal(scale=0.01, size=(rows, groups)).astype(kind.scale)
    zeros = generator.integers(0, 16, (rows, groups)).astype(np.uint8) if kind.zero_points else None
    minima = generator.normal(scale=0.1, size=(rows, groups)).astype(np.float16) if kind.minima else None
    return Quantized(codes, scales, zeros, minima)
