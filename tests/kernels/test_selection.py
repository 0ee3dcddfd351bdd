"""Selecting positions on the CPU: the best by their scores, over pages, for every kind of step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.model import SelectionSpec
from moec.compiler.kernels.cpu.selection import selection
from moec.compiler.kernels.reference import select

Compile = Callable[[Any, int], Callable[..., None]]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WORDS = 6
STEPS = [
    [(0, 7)],
    [(0, 1), (1, 33), (3, 2)],
    [(2, 100), (0, 3)],
    [(s, 1) for s in range(4)],
    [(1, 90), (2, 1)],
]
"""(sequence, new tokens) of each step."""


def bits_of(words: torch.Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    places = torch.arange(32, dtype=torch.int64)
    return ((words.long()[..., None] >> places) & 1).bool().reshape(len(words), -1).numpy()


@pytest.mark.parametrize(
    ("lanes", "spec"),
    [
        (16, SelectionSpec("s", 4, 16, 0.25, 10, "float32")),
        (8, SelectionSpec("s", 3, 40, 0.1, 64, "bfloat16")),
        (4, SelectionSpec("s", 5, 9, 0.5, 1, "float32")),
    ],
)
def test_the_best_positions_are_selected(compiled: Compile, lanes: int, spec: SelectionSpec) -> None:
    run = compiled(selection(spec, lanes=lanes), lanes)
    generator = torch.Generator().manual_seed(5)
    cache = torch.full((40, 1, PAGE_TOKENS, spec.dim), float("nan")).to(DTYPES[spec.dtype])
    table = torch.randperm(40, generator=generator)[:24].reshape(4, 6).int()
    history: list[list[torch.Tensor]] = [[] for _ in range(4)]
    for step in STEPS:
        sequence = [number for number, count in step for _ in range(count)]
        query = torch.randn(1, len(sequence), spec.heads, spec.dim, generator=generator)
        weight = torch.randn(1, len(sequence), spec.heads, generator=generator)
        key = torch.randn(1, len(sequence), spec.dim, generator=generator)
        position = []
        for token, number in enumerate(sequence):
            position.append(len(history[number]))
            history[number].append(key[0, token].to(DTYPES[spec.dtype]).float())
        out = torch.full((len(sequence), WORDS), 77, dtype=torch.int32)
        place = (torch.tensor(sequence).int(), torch.tensor(position).int())
        run(query, weight, key, cache, table, *place, out)
        found = bits_of(out)
        for token, number in enumerate(sequence):
            keys = torch.stack(history[number]).double().numpy()
            asked, weighed = (each[0, token].double().numpy() for each in (query, weight))
            expected = select(spec, asked, weighed, keys, position[token])
            assert expected.sum() == min(spec.top_k, position[token] + 1)
            np.testing.assert_array_equal(found[token, : position[token] + 1], expected)
            assert not found[token, position[token] + 1 :].any()


def test_of_equal_positions_the_earlier_are_selected(compiled: Compile) -> None:
    spec = SelectionSpec("s", 1, 4, 1.0, 5, "float32")
    run = compiled(selection(spec, lanes=8), 8)
    key = torch.zeros(1, 40, 4)
    key[0, [7, 33]] = 1.0
    query, weight = torch.ones(1, 40, 1, 4), torch.ones(1, 40, 1)
    cache, table = torch.zeros(2, 1, PAGE_TOKENS, 4), torch.arange(2).reshape(1, 2).int()
    for sign, chosen in ((1.0, [0, 1, 2, 7, 33]), (-1.0, [0, 1, 2, 3, 4])):
        out = torch.zeros(40, 2, dtype=torch.int32)
        run(query, weight * sign, key, cache, table, torch.zeros(40).int(), torch.arange(40).int(), out)
        assert np.flatnonzero(bits_of(out)[39]).tolist() == chosen
