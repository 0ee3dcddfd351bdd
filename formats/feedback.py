"""Rounding to integers where what enters a product is known: the error of a column is taken up by those after it.

GPTQ, Frantar et al., arXiv 2210.17323, with scales and zero points as `round_to_nearest` finds them, columns in the
order of what they count, and second moments that are believed as far as there are samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

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
"""Columns whose errors are gathered before those after the block take them up."""
ROWS_AT_ONCE = 2048
"""Rows of a matrix that go through the columns together: so few that a block's errors stay near a core."""
SCALING_ROWS = 256
"""Rows that powers are tried on."""
LEAST_HALF = 32
"""Rows; smaller matrices are factored and inverted whole."""


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


def shrunk(moments: Floats, samples: int, towards: Floats | None = None) -> Floats:
    """Second moments ``[K, K]`` of some samples, drawn ``towards`` others, by default their own diagonal."""
    part = np.float32(samples / (samples + SHRINKAGE))
    found = moments * part
    if towards is None:
        np.fill_diagonal(found, np.diag(moments))
    else:
        found += towards * (1 - part)
    return found


def feedback(moments: Floats) -> Feedback:
    """Make the factor of second moments ``[K, K]`` of what enters; not all of them are zero.

    The moments with their columns in reverse are ``L @ L.T``; U is the inverse of L, rows and columns in reverse. All
    in float32: damping bounds the condition.
    """
    importance = np.diag(moments)
    order = np.argsort(-importance, kind="stable")
    damped = moments[np.ix_(order[::-1], order[::-1])].astype(np.float32)
    damped[np.diag_indices_from(damped)] += np.float32(DAMPING * importance.mean())
    _invert_factor(damped)
    return Feedback(order, np.ascontiguousarray(damped[::-1, ::-1]))


def _invert_factor(matrix: Floats) -> None:
    """Put the inverse of its lower Cholesky factor in a matrix's place, by halves: nearly all of it is products."""
    half = len(matrix) // 2
    if half < LEAST_HALF:
        matrix[:] = np.linalg.inv(np.linalg.cholesky(matrix))
        return
    first, below, second = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    _invert_factor(first)
    below[:] = below @ first.T
    second -= below @ below.T
    _invert_factor(second)
    below[:] = -(second @ (below @ first))
    matrix[:half, half:] = 0


def column_scales(kind: Format, matrix: Floats, moments: Floats) -> Floats:
    """What to multiply the columns ``[K]`` of ``[N, K]`` values with before they are rounded.

    A power of each column's root mean square input: what counts more gets more of the codes that its group shares (AWQ,
    Lin et al., arXiv 2306.00978). The power is the one that makes the error of products least, perhaps none, as evenly
    spread rows say.

    Raises:
        ValueError: a value is not finite.
    """
    size = np.sqrt(np.diag(moments)) + SMALLEST
    rows = matrix[:: -(-len(matrix) // SCALING_ROWS)]
    best, least = np.ones(len(size), np.float32), np.inf
    for power in POWERS:
        scales = size**power
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        error = dequantize(kind, round_to_nearest(kind, rows * scales)) / scales - rows
        total = float(np.vdot(error @ moments, error))
        if total < least:
            best, least = scales, total
    return best


def round_with_feedback(kind: Format, matrix: Floats, factor: Feedback) -> Quantized:
    """Quantize ``[N, K]`` values, each row by itself.

    Raises:
        ValueError: a value is not finite.
    """
    found = round_to_nearest(kind, matrix)
    codes = np.empty_like(found.codes)
    for begin in range(0, len(matrix), ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        codes[rows, factor.order] = _codes(kind, matrix[rows], _part(found, rows), factor).T
    return Quantized(codes, found.scales, found.zeros, found.minima)


def _part(whole: Quantized, rows: slice) -> Quantized:
    zeros = None if whole.zeros is None else whole.zeros[rows]
    return Quantized(
        whole.codes[rows], whole.scales[rows], zeros, None if whole.minima is None else whole.minima[rows]
    )


def _codes(kind: Format, matrix: Floats, found: Quantized, factor: Feedback) -> NDArray[Any]:
    """Codes ``[K, N]`` in the factor's order, with the scales, zero points and minima that were found."""
    groups, upper = factor.order // kind.group, factor.upper
    scales = np.ascontiguousarray(found.scales.T, np.float32)  # [G, N], as the others
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    zeros = np.full_like(scales, 0 if kind.minima else CENTRES[kind.codes])
    if found.zeros is not None:
        zeros[:] = found.zeros.T
    lowest, highest = -zeros, SPANS[kind.codes] - zeros
    values = matrix.T[factor.order].astype(np.float32)
    if found.minima is not None:
        values -= found.minima.astype(np.float32).T[groups]
    codes = np.empty(values.shape, found.codes.dtype)
    for begin in range(0, len(values), BLOCK):
        end = min(begin + BLOCK, len(values))
        earlier = np.ascontiguousarray(upper[begin:end, begin:end].T)
        errors = np.empty((end - begin, values.shape[1]), np.float32)
        for number, group in enumerate(groups[begin:end]):
            value = values[begin + number] - earlier[number, :number] @ errors[:number]
            steps = np.rint(value * inverse[group])
            np.clip(steps, lowest[group], highest[group], out=steps)
            codes[begin + number] = steps + zeros[group] if kind.codes == "int4" else steps
            steps *= scales[group]
            np.subtract(value, steps, out=errors[number])
            errors[number] /= earlier[number, number]
        values[end:] -= upper[begin:end, end:].T @ errors
    return codes
