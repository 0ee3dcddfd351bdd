"""Round to nearest, with the scale that makes the squared error of its group least."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from moec.formats.affine import FLOAT16_LARGEST, round_affine
from moec.formats.minifloat import E8M0_BIAS, MINIFLOATS, e8m0_values
from moec.formats.rows import SYMMETRIC_ZERO, Quantized

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from moec.formats.record import Format

Floats: TypeAlias = "NDArray[np.float32]"

CHUNK_VALUES = 1 << 18
"""Values quantized at once: so few that passes over them stay near a core, so many that threads seldom wait for
Python's lock between two passes."""
CENTRES = {"int8": 127, "int4": SYMMETRIC_ZERO}
"""What the code of zero is above the lowest code, where there are no zero points."""
SPANS = {"int8": 254, "int4": 15}
"""From the lowest code to the highest."""
RANGES = {"int8": (1.0,), "int4": tuple(np.linspace(1.15, 0.65, 11))}
"""What codes are tried for, as parts of a group's range. With 8 bits nothing is gained by clipping; with 4, twice as
many change the error of normal values by 0.2 % at most."""


def round_to_nearest(kind: Format, matrix: Floats, importance: Floats | None = None) -> Quantized:
    """Quantize a matrix.

    For int4, several ranges are tried for each group, without zero points or minima with the larger side of its values
    on the side of -8, which has a code more. For each range, the codes give the scale (and minimum) that fits them
    best, and the scale the final codes. For MXFP4, the power of two with which nothing is clipped is tried and the one
    below it.

    Args:
        kind: the format.
        matrix: finite values ``[N, K]``.
        importance: what a squared error counts in each column, ``[K]``; all the same if None.

    Raises:
        ValueError: a value is not finite.
    """
    rows, columns = matrix.shape
    groups = -(-columns // kind.group)
    width = groups * kind.group
    weights = None
    if importance is not None:
        weights = np.zeros(width, np.float32)
        weights[:columns] = importance
        weights = weights.reshape(groups, kind.group)
    codes = np.empty((rows, columns), np.int8 if kind.codes == "int8" else np.uint8)
    parts = []
    step = max(1, CHUNK_VALUES // width)
    for first in range(0, rows, step):
        chunk = matrix[first : first + step]
        if not np.isfinite(chunk).all():
            raise ValueError("values that are not finite cannot be quantized")
        values = np.zeros((len(chunk), width), np.float32)
        values[:, :columns] = chunk
        part = _ROUND[kind.codes](kind, values.reshape(len(chunk), groups, kind.group), weights)
        codes[first : first + step] = part.codes.reshape(len(chunk), width)[:, :columns]
        parts.append(part)
    zeros = [part.zeros for part in parts if part.zeros is not None]
    minima = [part.minima for part in parts if part.minima is not None]
    scales = np.concatenate([part.scales for part in parts])
    return Quantized(
        codes,
        scales,
        np.concatenate(zeros) if zeros else None,
        np.concatenate(minima) if minima else None,
    )


# From here on values are [n, G, g], importance [G, g], what a group has one of [n, G].


def _integers(kind: Format, values: Floats, importance: Floats | None) -> Quantized:
    if kind.minima:
        return round_affine(values, importance, RANGES[kind.codes])
    shape = values.shape[:2]
    best, zero, score = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.full(shape, -np.inf)
    steps = np.empty_like(values)
    weighted = values if importance is None else values * importance
    for candidate, candidate_zero in _candidates(kind, values):
        _round(kind, values, candidate, candidate_zero, steps)
        products = np.einsum("ngk,ngk->ng", weighted, steps)
        squares = np.einsum("ngk,ngk->ng", steps, steps if importance is None else steps * importance)
        fitted = np.divide(products, squares, out=np.zeros_like(products), where=squares > 0)
        better = products * fitted > score
        score = np.where(better, products * fitted, score)
        best, zero = np.where(better, fitted, best), np.where(better, candidate_zero, zero)
    scales = np.clip(best, -FLOAT16_LARGEST, FLOAT16_LARGEST).astype(np.float16)
    _round(kind, values, scales.astype(np.float32), zero, steps)
    if kind.codes == "int8":
        return Quantized(steps.astype(np.int8), scales)
    steps += zero[..., None]
    return Quantized(steps.astype(np.uint8), scales, zero.astype(np.uint8) if kind.zero_points else None)


def _candidates(kind: Format, values: Floats) -> Iterator[tuple[Floats, Floats]]:
    """Scales and zero points."""
    smallest, largest = _pairwise(np.minimum, values), _pairwise(np.maximum, values)
    if kind.zero_points:
        smallest, largest = np.minimum(smallest, 0), np.maximum(largest, 0)
        for part in RANGES[kind.codes]:
            scale = (largest - smallest) * np.float32(part / SPANS[kind.codes])
            yield scale, np.rint(-smallest * np.float32(part) * _inverse(scale))
        return
    centre = CENTRES[kind.codes]
    extreme = np.where(-smallest >= largest, smallest, largest)
    for part in RANGES[kind.codes]:
        yield extreme * np.float32(-part / centre), np.full_like(extreme, centre)


def _round(kind: Format, values: Floats, scale: Floats, zero: Floats, steps: Floats) -> None:
    """Fill ``steps`` with the whole numbers from ``-zero`` to what the largest code is above it that are nearest."""
    np.multiply(values, _inverse(scale)[..., None], out=steps)
    np.rint(steps, out=steps)
    span = SPANS[kind.codes]
    if kind.zero_points:
        np.maximum(steps, -zero[..., None], out=steps)
        np.minimum(steps, (span - zero)[..., None], out=steps)
    else:
        centre = CENTRES[kind.codes]
        np.clip(steps, -centre, span - centre, out=steps)


def _pairwise(function: np.ufunc, values: Floats) -> Floats:
    """A reduction over each group, of 2 ** n values, halved n times: long loops are faster than many short ones."""
    reduced = values.reshape(-1)
    while reduced.size > values.shape[0] * values.shape[1]:
        reduced = function(reduced[0::2], reduced[1::2])
    return reduced.reshape(values.shape[:2])


def _inverse(scale: Floats) -> Floats:
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def _e4m3(kind: Format, values: Floats, importance: Floats | None) -> Quantized:  # noqa: ARG001
    encoding = MINIFLOATS[kind.codes]
    scales = _pairwise(np.maximum, np.abs(values)) / np.float32(encoding.largest)
    return Quantized(encoding.encode(values * _inverse(scales)[..., None]), scales)


def _e2m1(kind: Format, values: Floats, importance: Floats | None) -> Quantized:
    encoding, powers = MINIFLOATS[kind.codes], e8m0_values()
    table = encoding.values()
    mantissa, exponent = np.frexp(_pairwise(np.maximum, np.abs(values)) / np.float32(encoding.largest))
    wide = np.clip(np.where(mantissa == 0.5, exponent - 1, exponent) + E8M0_BIAS, 0, 254)
    found: list[tuple[NDArray[np.uint8], NDArray[np.uint8], Floats]] = []
    for byte in (wide, np.maximum(wide - 1, 0)):
        scale = powers[byte][..., None]
        codes = encoding.encode(values / scale)
        errors = np.square(table[codes] * scale - values)
        found.append(
            (codes, byte.astype(np.uint8), (errors if importance is None else errors * importance).sum(2))
        )
    (codes, scales, error), (clipped, below, clipped_error) = found
    better = clipped_error < error
    return Quantized(np.where(better[..., None], clipped, codes), np.where(better, below, scales))


_ROUND = {"int8": _integers, "int4": _integers, "e4m3": _e4m3, "e2m1": _e2m1}
