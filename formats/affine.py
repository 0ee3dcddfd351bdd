"""Round to nearest with a scale and a minimum for each group, those that make the squared error least."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from moec.formats.rows import Quantized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Floats: TypeAlias = "NDArray[np.float32]"

LARGEST_CODE = 15
FLOAT16_LARGEST = np.float32(65504)


def round_affine(values: Floats, importance: Floats | None, parts: Sequence[float]) -> Quantized:
    """Quantize groups ``[n, G, g]`` of finite values to codes of 4 bits.

    Of each group's range several parts around its middle are tried; for each, the codes give the line through them
    that fits best, and the line the final codes.

    Args:
        values: what is rounded.
        importance: what a squared error counts, ``[G, g]``; all the same if None.
        parts: of the range.
    """
    weights = np.ones(values.shape[1:], np.float32) if importance is None else importance
    smallest, largest = values.min(2), values.max(2)
    shape = smallest.shape
    scales, minima, least = np.zeros(shape, np.float32), smallest.copy(), np.full(shape, np.inf, np.float32)
    for part in parts:
        width = (largest - smallest) * np.float32(part)
        begin = (largest + smallest - width) / 2
        codes = _codes(values, width / LARGEST_CODE, begin)
        scale, minimum = _line(values, codes, weights)
        error = np.einsum(
            "ngk,gk->ng", np.square(values - codes * scale[..., None] - minimum[..., None]), weights
        )
        better = error < least
        scales, minima, least = (
            np.where(better, new, old) for new, old in ((scale, scales), (minimum, minima), (error, least))
        )
    stored = [np.clip(one, -FLOAT16_LARGEST, FLOAT16_LARGEST).astype(np.float16) for one in (scales, minima)]
    codes = _codes(values, stored[0].astype(np.float32), stored[1].astype(np.float32))
    return Quantized(codes.astype(np.uint8), stored[0], minima=stored[1])


def _codes(values: Floats, scale: Floats, minimum: Floats) -> Floats:
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes: Floats = np.rint((values - minimum[..., None]) * inverse[..., None])
    return np.clip(codes, 0, LARGEST_CODE, out=codes)


def _line(values: Floats, codes: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Scale and minimum of the least squared error with these codes; level where all of a group are the same."""
    count = weights.sum(1)
    mean_code = np.einsum("ngk,gk->ng", codes, weights) / count
    mean = np.einsum("ngk,gk->ng", values, weights) / count
    away = codes - mean_code[..., None]
    squares = np.einsum("ngk,ngk,gk->ng", away, away, weights)
    products = np.einsum("ngk,ngk,gk->ng", away, values, weights)
    scale = np.divide(products, squares, out=np.zeros_like(products), where=squares > 0)
    return scale, mean - scale * mean_code
