from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moec.artifacts.activation import Expression
from moec.artifacts.experts import layout
from moec.artifacts.model import ExpertBody
from moec.compiler.kernels import reference
from moec.compiler.kernels.cuda.experts import experts, workspace_bytes
from moec.runtime.tensors import aligned_empty, aligned_zeros
from tests.support.cuda_emulator import Emulated

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = {"bfloat16": 2e-5, "float16": 4e-6, "float32": 4e-6}
"""Of a result, relative to the largest: two products, with 16 bits of mantissa beside bfloat16."""
SWIGLU: Expression = ("mul", ("silu", "gate"), "up")
CLAMPED: Expression = (
    "mul",
    ("add", ("max", ("min", "up", 1.0), -1.0), 1.0),
    ("mul", ("min", "gate", 1.0), ("sigmoid", ("mul", 1.702, ("min", "gate", 1.0)))),
)
BODIES = {
    "gated": ExpertBody("gated", 64, 32, True, False, False, SWIGLU, "bfloat16"),
    "ragged": ExpertBody("ragged", 88, 56, True, True, True, CLAMPED, "float16"),
    "plain": ExpertBody("plain", 40, 136, False, True, False, ("gelu", "up"), "bfloat16"),
    "long": ExpertBody("long", 2088, 1544, True, False, True, SWIGLU, "bfloat16"),
    "odd": ExpertBody("odd", 20, 7, False, False, True, ("relu", "up"), "float16"),
    "exact": ExpertBody("exact", 33, 20, True, True, True, SWIGLU, "float32"),
}


MOST = 17
"""Experts that a token chooses, at most."""


@cache
def _kernel(name: str) -> Emulated:
    return Emulated(experts(BODIES[name], MOST))


class Pool:
    """Experts in memory, the table of their addresses, and their parts as numbers."""

    def __init__(self, body: ExpertBody, count: int, generator: torch.Generator) -> None:
        self.body = body
        shape = layout(body)
        self.memory = aligned_empty((count * shape.stride_bytes,), np.uint8)
        self.memory[...] = 0xFF
        self.parts: list[dict[str, Any]] = []
        for expert in range(count):
            self.parts.append({})
            for part in shape.parts:
                scale = part.shape[-1] ** -0.5 if len(part.shape) == 2 else 0.3
                value = (torch.randn(part.shape, generator=generator) * scale).to(TYPES[body.dtype])
                self.parts[-1][part.name] = value.double().numpy()
                place = expert * shape.stride_bytes + part.offset_bytes
                self.memory[place : place + part.size_bytes] = value.view(-1).view(torch.uint8).numpy()
        self.table = aligned_empty((count,), np.int64)
        self.table[...] = self.memory.ctypes.data + np.arange(count) * shape.stride_bytes

    def run(self, x: NDArray[Any], index: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float32]:
        fixed, each = workspace_bytes(self.body, MOST, len(self.parts))
        space = aligned_empty((fixed + each * len(x),), np.uint8)
        space[...] = 0xFF  # not a number, in every type
        out = aligned_empty(x.shape, np.float32)
        out[...] = 7
        _kernel(self.body.name)(
            f"experts_{self.body.name}", *map(_aligned, (x, index, weight)), self.table, space, out
        )
        return out

    def expected(self, x: NDArray[Any], index: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float64]:
        return reference.experts(self.body, self.parts, x.astype(float), index, weight.astype(float))


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    copy = aligned_zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


def _step(generator: torch.Generator, body: ExpertBody, tokens: int, chosen: int, high: int) -> Any:
    x = torch.randn(tokens, body.hidden, generator=generator).numpy()
    index = torch.randint(-1, high, (tokens, chosen), generator=generator).numpy()
    return x, index, torch.rand(tokens, chosen, generator=generator).numpy()


@pytest.mark.parametrize("name", sorted(BODIES))
def test_experts_match_the_reference(name: str) -> None:
    """With experts that several tokens chose, that a token chose twice, and that there are none of."""
    generator = torch.Generator().manual_seed(1)
    pool = Pool(BODIES[name], 5, generator)
    sizes = [(1, 3), (8, 1)] if name == "long" else [(1, 1), (1, 6), (3, 4), (8, 7), (8, 17)]
    if BODIES[name].dtype == "float32":  # of 16-bit experts test_experts_many.py has more tokens
        sizes.append((11, 3))
    for tokens, chosen in sizes:
        x, index, weight = _step(generator, pool.body, tokens, chosen, 7)
        index[0, 0] = 3
        out, expected = pool.run(x, index, weight), pool.expected(x, index, weight)
        error = np.abs(out - expected).max() / np.abs(expected).max()
        assert error < TOLERANCE[pool.body.dtype], (tokens, chosen)


@pytest.mark.parametrize("name", ["ragged", "exact"])
def test_choices_of_no_expert_contribute_nothing(name: str) -> None:
    pool = Pool(BODIES[name], 2, torch.Generator().manual_seed(2))
    x = np.ones((2, pool.body.hidden), np.float32)
    for index in ([[2, -1], [1 << 40, -(1 << 62)]], [[2, -1], [1 << 32, 1]]):
        out = pool.run(x, np.array(index), np.ones((2, 2), np.float32))
        assert (out[0] == 0).all()
        assert (out[1] == 0).all() == (index[1][1] != 1)


def test_a_token_alone_has_the_same_bits_as_among_others() -> None:
    """Also where other tokens chose the same experts in another order."""
    generator = torch.Generator().manual_seed(3)
    pool = Pool(BODIES["ragged"], 6, generator)
    x, _, weight = _step(generator, pool.body, 8, 4, 6)
    index = np.stack([torch.randperm(6, generator=generator)[:4].numpy() for _ in range(8)])
    together = pool.run(x, index, weight)
    for token in range(8):
        row = slice(token, token + 1)
        assert np.array_equal(pool.run(x[row], index[row], weight[row])[0], together[token])


def test_the_same_step_twice_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(4)
    pool = Pool(BODIES["gated"], 8, generator)
    step = _step(generator, pool.body, 5, 6, 8)
    assert np.array_equal(pool.run(*step), pool.run(*step))
