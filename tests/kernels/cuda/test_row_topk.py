"""Entries of rows in falling order, as kernels of regions find them, in the emulator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moec.compiler.kernels.cuda.primitives import launch
from moec.compiler.kernels.cuda.rows.topk import RowTopK, emit_topk
from moec.compiler.kernels.emit import Argument, arguments, build, load, store
from moec.runtime.tensors import aligned_empty
from tests.support.cuda_emulator import Emulated

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tvm import tirx

THREADS = 64


def _nothing(*_: Any) -> Any:
    """Stands for callbacks that nobody calls."""


def kernel(rows: int, entries: int, count: int) -> tirx.PrimFunc:
    def body() -> None:
        x, values, indices = arguments(
            Argument("x", (rows, entries), "float32"),
            Argument("values", (rows, count), "float32"),
            Argument("indices", (rows, count), "int32"),
        )

        def keep(place: Any, value: Any, entry: Any) -> None:
            store(values, place, value)
            store(indices, place, entry)

        with launch((1,), THREADS) as (_, thread):
            emit_topk(RowTopK(rows, entries, count, lambda place: load(x, place), keep), thread, THREADS)

    return build("rows", body)


@pytest.mark.parametrize(
    ("rows", "entries", "count", "counts"),
    [(1, 64, 6, True), (3, 10, 10, True), (8, 32, 2, True), (1, 300, 8, False), (70, 16, 1, False)],
)
def test_the_largest_in_order_ties_by_rising_index(rows: int, entries: int, count: int, counts: bool) -> None:
    random = np.random.default_rng(entries)
    x = aligned_empty((rows, entries), np.float32)
    x[...] = np.round(random.standard_normal(x.shape), 1)
    x[0, ::3] *= 0.0  # zeros of both signs are equal
    assert RowTopK(rows, entries, count, _nothing, _nothing).counts(THREADS) == counts
    values, indices = run(x, count)
    expected = np.argsort(-x, axis=1, kind="stable")[:, :count]
    assert np.array_equal(indices, expected)
    assert np.array_equal(values, np.take_along_axis(x, expected, 1))


def test_what_is_not_a_number_has_one_place() -> None:
    """A router that overflowed still chooses experts that there are."""
    x = aligned_empty((1, 12), np.float32)
    x[...] = np.nan
    x[0, 4] = 2.0
    _, indices = run(x, 12)
    assert sorted(indices[0]) == list(range(12))


def run(x: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    rows, entries = x.shape
    values, indices = aligned_empty((rows, count), np.float32), aligned_empty((rows, count), np.int32)
    indices[...] = -1
    Emulated(kernel(rows, entries, count))("rows", x, values, indices)
    return values, indices
