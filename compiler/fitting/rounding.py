"""What rounding a weight to a format changes, and what that does to a product's result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moec.formats import FORMATS, METHODS, dequantize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.calibration.products import Product

ROWS_BYTES = 32 << 20
"""Rows are rounded so many bytes (of float32) at a time."""


def rounding_errors(weight: torch.Tensor, kind: str, method: str) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of ``weight [N, K]``, some at a time, and what rounding adds to them, float32."""
    step = max(1, ROWS_BYTES // (4 * weight.shape[1]))
    for begin in range(0, weight.shape[0], step):
        rows = weight[begin : begin + step].float()
        rounded = dequantize(FORMATS[kind], METHODS[method](FORMATS[kind], rows.numpy()))
        yield slice(begin, begin + len(rows)), torch.from_numpy(rounded) - rows


def divergence(product: Product, kind: str, method: str) -> float:
    """Predicted Kullback-Leibler divergence, summed over the tokens, if this weight alone is rounded to a format.

    Half the sum of squares of gradient times error, over tokens and entries of the result: the second-order term of the
    divergence (its first is zero) by the Fisher information, whose expectation over roundings has no products of
    different entries.
    """
    assert product.gradient is not None
    total = 0.0
    for rows, error in rounding_errors(product.weight, kind, method):
        if product.x.dtype == torch.int64:
            inside = (product.x >= rows.start) & (product.x < rows.stop)
            change, gradient = error[product.x[inside] - rows.start], product.gradient[inside]
        else:
            change, gradient = product.x @ error.T, product.gradient[:, rows]
        total += 0.5 * float((gradient * change).square().sum())
    return total


def relative_error(weight: torch.Tensor, kind: str, method: str) -> float:
    """The squared error's share of the squared values."""
    errors = sum(float(error.square().sum()) for _, error in rounding_errors(weight, kind, method))
    return errors / max(float(weight.float().square().sum()), 1e-30)
