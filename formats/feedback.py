"""Rounding to integers where what enters a product is known: the error of a column is taken up by those after it.

GPTQ, Frantar et al., arXiv 2210.17323, with scales and zero points as `round_to_nearest` finds them, columns in the
order of what they count, and second moments that are believed as far as there are samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from moec.formats.nearest import CENTRES, SPANS, round_to_nearest
from moec.formats.reference import dequantize
from moec.formats.rows import Quantized

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.formats.record import Format

Floats: TypeAlias = "NDArray[np.float32]"

SHRINKAGE = 1024
"""Samples at which moments are half believed. Without this few samples make results worse than rounding to nearest."""
DAMPING = 0.1
"""Added to each second moment, as a part of their mean: what was not seen may come as well."""
POWERS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
SMALLEST = 1e-6
"""Of a root mean square, so that what never entered has a power."""
BLOCK = 128
"""Columns whose errors are gathered before those after them take them up."""


@dataclass(frozen=True, eq=False)
class Feedback:
    """Which columns come first, and how much of a column's error each later one takes up."""

    order: NDArray[np.intp]
    """``[K]``."""
    upper: Floats
    """``[K, K]``, in this order: U with ``U.T @ U`` the inverse of the moments."""


def takes_feedback(kind: Format) -> bool:
    """Whether the format's codes are whole numbers."""
    return kind.codes in CENTRES


def shrunk(
    moments: NDArray[np.float64], samples: int, towards: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Second moments ``[K, K]`` of some samples, drawn ``towards`` others, by default their own diagonal."""
    part = samples / (samples + SHRINKAGE)
    rest = np.diag(np.diag(moments)) if towards is None else towards
    return moments * part + rest * (1 - part)


def feedback(moments: NDArray[np.float64]) -> Feedback:
    """Make the factor of second moments ``[K, K]`` of what enters; not all of them are zero."""
    importance = np.diag(moments)
    order = np.argsort(-importance, kind="stable")
    damped = moments[np.ix_(order, order)]
    damped[np.diag_indices_from(damped)] += DAMPING * importance.mean()
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    return Feedback(order, np.ascontiguousarray(upper, np.float32))


def column_scales(kind: Format, matrix: Floats, moments: NDArray[np.float64]) -> Floats:
    """What to multiply the columns ``[K]`` of ``[N, K]`` values with before they are rounded.

    A power of each column's root mean square input: what counts more gets more of the codes that its group shares (AWQ,
    Lin et al., arXiv 2306.00978). The power is the one that makes the error of products least, perhaps none.

    Raises:
        ValueError: a value is not finite.
    """
    size = np.sqrt(np.diag(moments)) + SMALLEST
    pairs = moments.astype(np.float32)
    best, least = np.ones(len(size), np.float32), np.inf
    for power in POWERS:
        scales = size**power
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        error = dequantize(kind, round_to_nearest(kind, matrix * scales)) / scales - matrix
        total = float(np.einsum("nk,nk", error @ pairs, error))
        if total < least:
            best, least = scales, total
    return best


def round_with_feedback(kind: Format, matrix: Floats, factor: Feedback) -> Quantized:
    """Quantize ``[N, K]`` values, each row by itself.

    Raises:
        ValueError: a value is not finite.
    """
    found = round_to_nearest(kind, matrix)
    columns = matrix.shape[1]
    groups = factor.order // kind.group
    scales = found.scales.astype(np.float32).T[groups]  # [K, N], as all below, in the factor's order
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    centres = np.full_like(found.scales, 0 if kind.minima else CENTRES[kind.codes], np.float32)
    zeros = (centres if found.zeros is None else found.zeros.astype(np.float32)).T[groups]
    lowest, highest = -zeros, SPANS[kind.codes] - zeros
    values = matrix.T[factor.order].astype(np.float32)
    if found.minima is not None:
        values -= found.minima.astype(np.float32).T[groups]
    steps = np.empty_like(values)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors = np.empty((end - begin, len(matrix)), np.float32)
        for column in range(begin, end):
            rounded = np.rint(values[column] * inverse[column])
            steps[column] = np.clip(rounded, lowest[column], highest[column])
            error = (values[column] - steps[column] * scales[column]) / factor.upper[column, column]
            values[column + 1 : end] -= factor.upper[column, column + 1 : end, None] * error
            errors[column - begin] = error
        values[end:] -= factor.upper[begin:end, end:].T @ errors
    codes = np.empty_like(found.codes)
    if kind.codes == "int4":
        steps += zeros
    codes[:, factor.order] = steps.T.astype(codes.dtype)
    return Quantized(codes, found.scales, found.zeros, found.minima)
