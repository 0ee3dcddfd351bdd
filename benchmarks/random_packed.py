"""Random experts in a format of quantized weights: all codes alike, scales that give values the usual deviation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.experts import layout
from moec.artifacts.model import DTYPE_BYTES
from moec.formats import Quantized, format_of, pack_rows
from moec.formats.reference import code_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from moec.artifacts.model import ExpertBody
    from moec.formats import Format

DIFFERENT = 8
"""Experts before they repeat."""
SPREAD = 0.5
"""Scales are within this part of their mean."""
E8M0_BIAS = 127


def random_matrix(
    kind: Format, rows: int, columns: int, deviation: float, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Packed rows ``[rows, row_bytes]``."""
    groups = -(-columns // kind.group)
    size = (rows, columns)
    if kind.codes == "int8":
        codes = generator.integers(-127, 128, size, np.int8)
    else:
        codes = generator.integers(0, 1 << kind.bits, size, np.uint8).view(np.int8)
        if kind.codes == "e4m3":  # no NaN, and none of the largest
            codes &= np.int8(-65)  # 0xBF
        codes = codes.view(np.uint8)
    zeros = generator.integers(6, 10, (rows, groups), np.uint8) if kind.zero_points else None
    sample = Quantized(codes[:8], np.ones((8, groups)), None if zeros is None else zeros[:8])
    mean = deviation / float(code_values(kind, sample).std())
    scales = mean * generator.uniform(1 - SPREAD, 1 + SPREAD, (rows, groups))
    if kind.scale == "e8m0":
        stored = (np.rint(np.log2(scales)) + E8M0_BIAS).astype(np.uint8)
    else:
        stored = scales.astype(kind.scale)
    return pack_rows(kind, Quantized(codes, stored, zeros))


def random_experts(body: ExpertBody, deviation: float, seed: int = 0) -> NDArray[np.uint8]:
    """``[DIFFERENT, stride]`` bytes of experts whose matrices are quantized; biases are zero."""
    kind, place = format_of(body.format), layout(body)
    assert kind is not None
    generator = np.random.default_rng(seed)
    memory = np.zeros((DIFFERENT, place.stride_bytes), np.uint8)
    for part in place.parts:
        if len(part.shape) == 1:
            continue
        columns = body.intermediate if part.name == "down" else body.hidden
        packed = random_matrix(kind, DIFFERENT * part.shape[0], columns, deviation, generator)
        memory[:, part.offset_bytes : part.offset_bytes + part.size_bytes] = packed.reshape(DIFFERENT, -1)
    return memory


def experts_of(memory: NDArray[np.uint8], first: int, count: int) -> Iterator[memoryview]:
    """``count`` experts, one after the other, beginning with number ``first`` of those that there are."""
    for number in range(first, first + count):
        yield memoryview(memory[number % len(memory)]).cast("B")


def weights_of(body: ExpertBody) -> int:
    """Weights of one expert in its matrices and biases."""
    place = layout(body)
    if body.format is None:
        return place.expert_bytes // DTYPE_BYTES[body.dtype]
    matrices = 3 if body.gated else 2
    return matrices * body.hidden * body.intermediate
