"""Rounding with error feedback against the formulas of optimal brain surgery, a column at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moec.formats import FORMATS, dequantize
from moec.formats.feedback import (
    DAMPING,
    SHRINKAGE,
    column_scales,
    feedback,
    round_with_feedback,
    shrunk,
    takes_feedback,
)
from moec.formats.nearest import round_to_nearest

if TYPE_CHECKING:
    from moec.formats import Format

ROWS, COLUMNS = 24, 200
"""More columns than are gathered at once; the last group is smaller."""
NAMES = ("int4-g32", "int4-g128-z", "int4-g32-m", "int8-g64")

kinds = pytest.mark.parametrize("kind", [FORMATS[name] for name in NAMES], ids=NAMES)


def matrix() -> Any:
    return np.random.default_rng(0).normal(0, 0.05, (ROWS, COLUMNS)).astype(np.float32)


def moments(samples: int = 4000) -> Any:
    """Of inputs that go together, with columns of very different size."""
    generator = np.random.default_rng(1)
    mixed = generator.normal(size=(COLUMNS, COLUMNS)) * np.exp(generator.normal(size=COLUMNS))
    x = generator.normal(size=(samples, COLUMNS)) @ mixed
    return x.T @ x / samples


def by_the_formulas(kind: Format, values: Any, hessian: Any) -> Any:
    """What is left of ``values`` where the least important column is rounded last, and the rest makes up for each."""
    start = round_to_nearest(kind, values)
    scales = start.scales.astype(np.float64)
    middle = 8 if kind.codes == "int4" and not kind.minima else 0
    minima = np.zeros(scales.shape) if start.minima is None else start.minima.astype(np.float64)
    zeros = np.full(scales.shape, middle) if start.zeros is None else start.zeros.astype(np.float64)
    low, high = (0, 15) if kind.codes == "int4" else (-127, 127)
    left, found = values.astype(np.float64), np.zeros(values.shape)
    order = np.argsort(-np.diag(hessian), kind="stable")
    damped = hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))
    for place, column in enumerate(order):
        group = column // kind.group
        steps = np.rint((left[:, column] - minima[:, group]) / scales[:, group])
        codes = np.clip(steps + zeros[:, group], low, high)
        found[:, column] = (codes - zeros[:, group]) * scales[:, group] + minima[:, group]
        rest = order[place:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        error = (left[:, column] - found[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return found


@kinds
def test_against_the_formulas(kind: Format) -> None:
    values, hessian = matrix(), moments()
    found = dequantize(kind, round_with_feedback(kind, values, feedback(hessian)))
    expected = by_the_formulas(kind, values, hessian)
    same = np.isclose(found, expected, rtol=1e-4, atol=1e-7)
    assert same.mean() > 0.99, "in float32 a value between two codes may fall on the other side"
    error, wanted = (np.einsum("nk,kl,nl", d, hessian, d) for d in (found - values, expected - values))
    assert error == pytest.approx(wanted, rel=0.02)


@kinds
def test_results_of_products_are_nearer(kind: Format) -> None:
    values, hessian = matrix(), moments()
    quantized = round_with_feedback(kind, values, feedback(hessian))
    nearest = round_to_nearest(kind, values)
    np.testing.assert_array_equal(quantized.scales, nearest.scales)
    errors = [dequantize(kind, each) - values for each in (quantized, nearest)]
    found, plain = (np.einsum("nk,kl,nl", error, hessian, error) for error in errors)
    assert found < 0.7 * plain


@kinds
def test_columns_that_have_nothing_in_common_are_rounded_to_nearest(kind: Format) -> None:
    values = matrix()
    diagonal = np.diag(np.random.default_rng(2).uniform(0.1, 5, COLUMNS).astype(np.float32))
    found, nearest = round_with_feedback(kind, values, feedback(diagonal)), round_to_nearest(kind, values)
    np.testing.assert_array_equal(found.codes, nearest.codes)


@kinds
def test_scaled_columns_make_products_nearer(kind: Format) -> None:
    """Where columns that share a scale count very differently."""
    values, hessian = matrix(), moments()
    scales = column_scales(kind, values, hessian)
    assert scales.max() > 1.5 * scales.min()
    errors = [
        dequantize(kind, round_to_nearest(kind, values * factor)) / factor - values
        for factor in (scales, np.ones_like(scales))
    ]
    found, plain = (np.einsum("nk,kl,nl", error, hessian, error) for error in errors)
    assert found < 0.95 * plain


@kinds
def test_columns_that_count_alike_are_left_alone(kind: Format) -> None:
    np.testing.assert_allclose(
        column_scales(kind, matrix(), 3 * np.eye(COLUMNS, dtype=np.float32)), 1, rtol=1e-6
    )


def test_moments_are_believed_as_far_as_there_are_samples() -> None:
    hessian = moments()
    np.testing.assert_allclose(shrunk(hessian, 0), np.diag(np.diag(hessian)))
    half = shrunk(hessian, SHRINKAGE)
    np.testing.assert_allclose(np.diag(half), np.diag(hessian))
    np.testing.assert_allclose(half[0, 1:], hessian[0, 1:] / 2)
    np.testing.assert_allclose(shrunk(hessian, SHRINKAGE, 3 * hessian), 2 * hessian)


def test_what_is_not_finite_is_refused() -> None:
    values = matrix()
    values[3, 7] = np.nan
    with pytest.raises(ValueError, match="finite"):
        round_with_feedback(FORMATS["int4-g32"], values, feedback(moments()))


def test_formats_that_take_it() -> None:
    assert [name for name, kind in FORMATS.items() if not takes_feedback(kind)] == ["fp8-e4m3", "mxfp4"]
