"""Selecting positions on a GPU, in the emulator, for every kind of step."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.model import SelectionSpec
from moec.compiler.kernels.cuda.selection import selection, workspace_bytes
from moec.compiler.kernels.cuda.selection.scores_tiles import fits
from moec.compiler.kernels.reference import select
from tests.kernels.cuda.test_attention import aligned
from tests.support.canaries import most_slow
from tests.support.cuda_emulator import Emulated
from tests.support.selections import bits_of

Array = NDArray[Any]
PAGES_EACH = 10
STEPS = [
    [(0, 7)],
    [(0, 1), (1, 33), (3, 2)],
    [(2, 300), (0, 3)],
    [(s, 1) for s in range(4)],
    [(1, 90), (2, 1)],
    [(2, 3), (1, 5)],
]
"""(sequence, new tokens) of each step."""
SPECS = {
    "as DeepSeek's": SelectionSpec("s", 64, 128, 0.1, 40, "float16"),
    "few heads": SelectionSpec("s", 3, 40, 0.2, 64, "float16"),
    "small": SelectionSpec("s", 16, 16, 0.25, 24, "float16"),
    "float32": SelectionSpec("s", 5, 12, 0.5, 10, "float32"),
    "the best alone": SelectionSpec("s", 5, 9, 0.5, 1, "float16"),
}


@cache
def emulated(spec: SelectionSpec) -> Emulated:
    return Emulated(selection(spec))


@pytest.mark.parametrize("name", most_slow(SPECS, ["small"]))
def test_the_best_positions_are_selected(name: str) -> None:
    spec = SPECS[name]
    random = np.random.default_rng(5)
    pages = 4 * PAGES_EACH
    keys = aligned(np.full((pages, 1, PAGE_TOKENS, spec.dim), np.nan), spec.dtype)
    table = aligned(random.permutation(pages).reshape(4, PAGES_EACH), "int32")
    history: list[list[Array]] = [[] for _ in range(4)]
    memory = aligned(np.full(workspace_bytes(PAGES_EACH + 1), 255), "uint8")
    for step in STEPS:
        sequence = [number for number, count in step for _ in range(count)]
        query = aligned(random.normal(size=(1, len(sequence), spec.heads, spec.dim)), "float32")
        weight = aligned(random.normal(size=(1, len(sequence), spec.heads)), "float32")
        key = aligned(random.normal(size=(1, len(sequence), spec.dim)), "float32")
        position = []
        for token, number in enumerate(sequence):
            position.append(len(history[number]))
            history[number].append(key[0, token].astype(spec.dtype).astype(np.float64))
        out = aligned(np.full((len(sequence), PAGES_EACH + 1), 77), "int32")
        places = (aligned(np.array(numbers), "int32") for numbers in (sequence, position))
        emulated(spec)("selection_s", query, weight, key, keys, table, *places, memory, out)
        found = bits_of(out)
        for token, number in enumerate(sequence):
            seen = position[token] + 1
            expected = select(
                spec,
                query[0, token].astype(np.float64),
                weight[0, token].astype(np.float64),
                np.stack(history[number]),
                position[token],
            )
            assert expected.sum() == min(spec.top_k, seen)
            np.testing.assert_array_equal(found[token, :seen], expected)
            assert not found[token, seen:].any()


@pytest.mark.parametrize("tokens", [4, 40])
def test_of_equal_positions_the_earlier_are_selected(tokens: int) -> None:
    spec = SelectionSpec("s", 1, 8, 1.0, 5, "float16")
    keys = aligned(np.zeros((2, 1, PAGE_TOKENS, 8)), "float16")
    keys[0, 0, 7], keys[1, 0, 1] = 1.0, 1.0
    key = aligned(np.zeros((1, tokens, 8)), "float32")
    query, weight = aligned(np.ones((1, tokens, 1, 8)), "float32"), np.ones((1, tokens, 1))
    position = aligned(np.arange(40 - tokens, 40), "int32")
    key[0, (position == 7) | (position == 33)] = 1.0
    memory = aligned(np.zeros(workspace_bytes(2)), "uint8")
    for sign, chosen in ((1.0, [0, 1, 2, 7, 33]), (-1.0, [0, 1, 2, 3, 4])):
        out = aligned(np.zeros((tokens, 2)), "int32")
        table = aligned(np.arange(2).reshape(1, 2), "int32")
        sequence = aligned(np.zeros(tokens), "int32")
        emulated(spec)(
            "selection_s",
            query,
            aligned(weight * sign, "float32"),
            key,
            keys,
            table,
            sequence,
            position,
            memory,
            out,
        )
        assert np.flatnonzero(bits_of(out)[-1]).tolist() == chosen


def test_tensor_cores_take_what_models_have() -> None:
    assert {name for name, spec in SPECS.items() if fits(spec)} == {"as DeepSeek's", "few heads", "small"}
