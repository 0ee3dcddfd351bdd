from __future__ import annotations

import numpy as np
import pytest
import torch

from moec.artifacts.activation import Expression
from moec.artifacts.model import ExpertBody
from tests.support.expert_pool import Pool, random_step

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


@pytest.mark.parametrize("name", sorted(BODIES))
def test_experts_match_the_reference(name: str) -> None:
    """With experts that several tokens chose, that a token chose twice, and that there are none of."""
    generator = torch.Generator().manual_seed(1)
    pool = Pool(BODIES[name], 5, generator)
    sizes = [(1, 3), (8, 1)] if name == "long" else [(1, 1), (1, 6), (3, 4), (8, 7), (8, 17)]
    if BODIES[name].dtype == "float32":  # of 16-bit experts test_experts_many.py has more tokens
        sizes.append((11, 3))
    for tokens, chosen in sizes:
        x, index, weight = random_step(generator, pool.body, tokens, chosen, 7)
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
    x, _, weight = random_step(generator, pool.body, 8, 4, 6)
    index = np.stack([torch.randperm(6, generator=generator)[:4].numpy() for _ in range(8)])
    together = pool.run(x, index, weight)
    for token in range(8):
        row = slice(token, token + 1)
        assert np.array_equal(pool.run(x[row], index[row], weight[row])[0], together[token])


def test_the_same_step_twice_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(4)
    pool = Pool(BODIES["gated"], 8, generator)
    step = random_step(generator, pool.body, 5, 6, 8)
    assert np.array_equal(pool.run(*step), pool.run(*step))
