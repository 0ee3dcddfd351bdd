"""Quantized experts: every format, against the numbers that their bytes stand for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moec.artifacts.activation import Expression
from moec.artifacts.model import ExpertBody
from moec.formats import FORMATS
from tests.support.expert_pool import Pool, random_step

TOLERANCE = 3e-6
"""Of a result of few tokens, relative to the largest: activations have 22 bits of mantissa."""
SWIGLU: Expression = ("mul", ("silu", "gate"), "up")
GATED = ExpertBody("gated", 320, 136, True, False, False, SWIGLU, "bfloat16", "int4-g32")
LONG = ExpertBody("long", 2056, 1544, True, True, True, SWIGLU, "float16", "int4-g32")
ODD = ExpertBody("odd", 36, 20, False, False, True, ("relu", "up"), "float32", "int4-g32")

WIDE = ExpertBody("wide", 296, 72, True, True, True, SWIGLU, "float16", "int4-g32")


def _compare(pool: Pool, tokens: int, chosen: int, generator: torch.Generator) -> None:
    x, index, weight = random_step(generator, pool.body, tokens, chosen, 7)
    index[0, 0] = 3
    out, expected = pool.run(x, index, weight), pool.expected(x, index, weight)
    assert np.abs(out - expected).max() / np.abs(expected).max() < TOLERANCE, (tokens, chosen)


def test_int4_experts_match_the_reference() -> None:
    """With experts that several tokens chose, that a token chose twice, and that there are none of."""
    generator = torch.Generator().manual_seed(1)
    pool = Pool(GATED, 5, generator)
    for tokens, chosen in [(1, 1), (1, 6), (3, 4), (8, 7)]:
        _compare(pool, tokens, chosen, generator)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FORMATS))
@pytest.mark.parametrize("body", [GATED, LONG, ODD], ids=lambda body: body.name)
def test_experts_of_every_format_match_the_reference(body: ExpertBody, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    pool = Pool(replace(body, format=kind), 5, generator)
    for tokens, chosen in [(1, 3), (8, 2)] if body is LONG else [(1, 1), (1, 6), (3, 4), (8, 7), (8, 17)]:
        _compare(pool, tokens, chosen, generator)


@pytest.mark.slow
def test_a_token_alone_has_the_same_bits_as_among_others() -> None:
    """Also where other tokens chose the same experts in another order."""
    generator = torch.Generator().manual_seed(3)
    pool = Pool(GATED, 6, generator)
    x, _, weight = random_step(generator, pool.body, 8, 4, 6)
    index = np.stack([torch.randperm(6, generator=generator)[:4].numpy() for _ in range(8)])
    together = pool.run(x, index, weight)
    for token in range(8):
        row = slice(token, token + 1)
        assert np.array_equal(pool.run(x[row], index[row], weight[row])[0], together[token])


ROUNDED = 2e-3
"""Of a result of many tokens: activations and dequantized weights are rounded to float16."""


@pytest.mark.slow
@pytest.mark.parametrize("hopper", [False, True], ids=["any", "hopper"])
@pytest.mark.parametrize("kind", ["int4-g32", "int4-g32-m", "int8-g128", "int4-g64-z", "fp8-e4m3", "mxfp4"])
@pytest.mark.parametrize("body", [GATED, ODD, WIDE], ids=lambda body: body.name)
def test_many_tokens(body: ExpertBody, kind: str, hopper: bool) -> None:
    """With experts that have few rows and many."""
    generator = torch.Generator().manual_seed(5)
    pool = Pool(replace(body, format=kind), 3, generator)
    for tokens, chosen in [(9, 2), (70, 3)]:
        x, index, weight = random_step(generator, pool.body, tokens, chosen, 4)
        out, expected = pool.run(x, index, weight, hopper=hopper), pool.expected(x, index, weight)
        error = np.abs(out - expected).max() / np.abs(expected).max()
        assert error < ROUNDED, (tokens, chosen)
