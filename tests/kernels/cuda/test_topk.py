"""The top-k kernel for GPUs, in the emulator."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moec.compiler.kernels.cuda.topk import topk
from moec.runtime.tensors import aligned_empty
from tests.support.cuda_emulator import Emulated

BITS = {"bfloat16": torch.int16, "float16": torch.float16, "float32": torch.float32}


def stored(values: torch.Tensor, dtype: str) -> NDArray[Any]:
    bits = values.view(BITS[dtype]).numpy()
    bits = bits.view(np.uint16) if dtype == "bfloat16" else bits
    array = aligned_empty(bits.shape, bits.dtype)
    array[...] = bits
    return array


@cache
def emulated(entries: int, count: int, dtype: str) -> Emulated:
    return Emulated(topk(entries=entries, count=count, dtype=dtype))


def run(x: torch.Tensor, count: int, dtype: str) -> tuple[torch.Tensor, NDArray[np.int64]]:
    rows, entries = x.shape
    values = stored(torch.full((rows, count), 99.0, dtype=x.dtype), dtype)
    indices = aligned_empty((rows, count), "int64")
    emulated(entries, count, dtype)("topk", (stored(x, dtype), dtype), (values, dtype), indices)
    bits = values.view(np.int16) if dtype == "bfloat16" else values
    return torch.from_numpy(bits).view(x.dtype), indices


def expected(x: torch.Tensor, count: int) -> NDArray[np.int64]:
    return np.argsort(-x.float().numpy(), axis=-1, kind="stable")[:, :count]


@pytest.mark.parametrize(
    ("rows", "entries", "count", "dtype"),
    [
        (1, 1, 1, "float32"),
        (7, 8, 2, "bfloat16"),
        (5, 64, 6, "float32"),
        (3, 33, 33, "float16"),
        (9, 512, 22, "float32"),
        (2, 513, 8, "float32"),
        (3, 2000, 5, "bfloat16"),
    ],
)
@pytest.mark.parametrize("coarse", [False, True])
def test_the_largest_in_order_ties_by_rising_index(
    rows: int, entries: int, count: int, dtype: str, coarse: bool
) -> None:
    x = torch.randn(rows, entries, generator=torch.Generator().manual_seed(entries)) * 2
    x = (x.round() if coarse else x).to(getattr(torch, dtype))
    values, indices = run(x, count, dtype)
    np.testing.assert_array_equal(indices, expected(x, count))
    assert torch.equal(values, torch.gather(x, 1, torch.from_numpy(indices)))


@pytest.mark.parametrize("entries", [40, 700])
def test_infinities(entries: int) -> None:
    x = torch.full((2, entries), -torch.inf)
    x[0, [3, 39]], x[1, 20] = torch.inf, 1.0
    _, indices = run(x, 4, "float32")
    np.testing.assert_array_equal(indices, [[3, 39, 0, 1], [20, 0, 1, 2]])


def test_not_a_number_gives_indices_in_range() -> None:
    _, indices = run(torch.full((1, 40), torch.nan), 3, "float32")
    assert (indices >= 0).all()
    assert (indices < 40).all()
