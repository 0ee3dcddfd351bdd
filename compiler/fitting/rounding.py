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


def product_losses(product: Product, kind: str, method: str) -> tuple[float, float]:
    """What rounding this weight alone does, summed over the tokens.

    First the predicted Kullback-Leibler divergence with the same experts chosen: half the sum of squares of gradient
    times error, over tokens and entries of the result, which is the second-order term of the divergence (its first is
    zero) by the Fisher information; its expectation over roundings has no products of different entries. Second the sum
    of squares with the gradient of routing, see `moec.compiler.calibration.routing`.
    """
    smooth = swaps = 0.0
    places: torch.Tensor | slice
    for rows, error in rounding_errors(product.weight, kind, method):
        if product.x.dtype == torch.int64:
            places = torch.where((product.x >= rows.start) & (product.x < rows.stop))[0]
            change, columns = error[product.x[places] - rows.start], slice(None)
        else:
            places, change, columns = slice(None), product.x @ error.T, rows
        # The change is the first factor: torch sums in its order, whatever the strides of the gradients.
        if product.gradient is not None:
            smooth += 0.5 * float((change * product.gradient[places, columns]).square().sum())
        if product.routing is not None:
            swaps += float((change * product.routing[places, columns]).square().sum())
    return smooth, swaps


def relative_error(weight: torch.Tensor, kind: str, method: str) -> float:
    """The squared error's share of the squared values."""
    errors = sum(float(error.square().sum()) for _, error in rounding_errors(weight, kind, method))
    return errors / max(float(weight.float().square().sum()), 1e-30)
