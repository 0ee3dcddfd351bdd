from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.formats import FORMATS, METHODS, Format, dequantize, dequantize_rows, pack_rows
from moec.formats.nearest import CHUNK_VALUES, round_to_nearest

names = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)

RELATIVE_ERRORS = {"int8": 0.01, "int4": 0.12, "e4m3": 0.03, "e2m1": 0.14}
"""Root mean square of what rounding changes over that of normal values, at most."""


def weights(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(scale=0.02, size=(rows, columns)).astype(np.float32)


def squared_error(kind: Format, matrix: NDArray[np.float32], importance: Any = None) -> float:
    found = dequantize(kind, round_to_nearest(kind, matrix, importance))
    return float(np.square(found - matrix).sum())


@names
@pytest.mark.parametrize("columns", [1, 45, 384])
def test_values_stay_near(kind: Format, columns: int) -> None:
    matrix = weights(64, columns)
    error = np.sqrt(squared_error(kind, matrix) / np.square(matrix).sum())
    assert error < RELATIVE_ERRORS[kind.codes]


@names
def test_what_a_format_can_say_comes_back_exactly(kind: Format) -> None:
    """Values that are whole multiples of a power of two, the largest code among them."""
    generator = np.random.default_rng(1)
    whole = generator.integers(-7, 8, (4, 256)).astype(np.float32)
    whole[:, :: kind.group] = {"int8": 127, "int4": -8, "e4m3": 448, "e2m1": 6}[kind.codes]
    if kind.codes == "e2m1":
        whole[np.isin(np.abs(whole), (5, 7))] = 4
    if kind.zero_points or kind.minima:
        whole[:, 1 :: kind.group] = 7
    matrix = whole * np.float32(2**-7)
    np.testing.assert_array_equal(dequantize(kind, round_to_nearest(kind, matrix)), matrix)


@names
def test_rows_do_not_depend_on_each_other(kind: Format) -> None:
    """Nor on how a matrix is cut: packing reads it in pieces."""
    matrix = weights(2 * (CHUNK_VALUES // 384) + 5, 384)
    whole = pack_rows(kind, round_to_nearest(kind, matrix))
    parts = [pack_rows(kind, round_to_nearest(kind, part)) for part in (matrix[:7], matrix[7:])]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@names
def test_extreme_values(kind: Format) -> None:
    matrix = np.array([[0.0] * 128, [1e-30] * 128, [3e4] * 128, [-3e4] * 128, [1e-5] * 128], np.float32)
    found = dequantize_rows(kind, pack_rows(kind, round_to_nearest(kind, matrix)), 128)
    np.testing.assert_allclose(found, matrix, rtol=0.26, atol=1e-6)
    assert not found[0].any()


@names
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(kind: Format, value: float) -> None:
    matrix = weights(3, 64)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match="finite"):
        round_to_nearest(kind, matrix)


@pytest.mark.parametrize(
    "kind", [kind for kind in FORMATS.values() if kind.codes == "int4"], ids=lambda k: k.name
)
def test_clipping_loses_less_than_covering_the_range(kind: Format) -> None:
    matrix = weights(256, 512)
    assert squared_error(kind, matrix) < 0.93 * np.square(_covering(kind, matrix) - matrix).sum()


def _covering(kind: Format, matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to nearest with the scale that clips nothing: the arithmetic of llama.cpp's Q4_0, or with zero points."""
    values = matrix.reshape(len(matrix), -1, kind.group)
    low, high = values.min(2, keepdims=True), values.max(2, keepdims=True)
    if kind.zero_points:
        scale = (high - low) / 15
        zero = np.rint(-low / scale)
    else:
        scale = np.where(-low >= high, low, high) / -8
        zero = np.full_like(scale, 8)
    codes = np.clip(np.rint(values / scale) + zero, 0, 15)
    result: NDArray[np.float32] = ((codes - zero) * scale).reshape(matrix.shape).astype(np.float32)
    return result


@pytest.mark.parametrize("name", ["int4-g32", "int4-g128", "int4-g64-z", "mxfp4"])
def test_importance_moves_the_error_to_where_it_counts_less(name: str) -> None:
    kind = FORMATS[name]
    matrix = weights(128, 256)
    importance = np.random.default_rng(3).lognormal(sigma=2, size=256).astype(np.float32)

    def error(given: Any) -> float:
        found = dequantize(kind, round_to_nearest(kind, matrix, given))
        return float((np.square(found - matrix) * importance).sum())

    assert error(importance) < 0.95 * error(None)


def test_methods_have_names() -> None:
    assert METHODS["nearest"] is round_to_nearest
