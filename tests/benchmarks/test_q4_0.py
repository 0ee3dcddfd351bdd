"""The yardstick against its definition, value by value."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.support.q4_0 import q4_0, q8_0

BLOCK = 32


def test_q4_0_is_what_its_definition_says() -> None:
    values = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    values[1, :32] = 0
    values[2, 32:64] = -1.5
    found = q4_0(values)
    for row in range(3):
        for start in range(0, 96, BLOCK):
            block = [float(value) for value in values[row, start : start + BLOCK]]
            largest = max(block, key=abs)
            exact = np.float32(largest) / np.float32(-8)
            stored = float(np.float16(exact))
            for k, value in enumerate(block):
                code = 8 if exact == 0 else min(15, math.floor(value / float(exact) + 8.5))
                assert found[row, start + k] == np.float32(code - 8) * np.float32(stored)


def test_the_largest_value_keeps_its_sign_and_magnitude() -> None:
    values = np.linspace(-1, 0.75, BLOCK, dtype=np.float32)
    assert q4_0(values)[0] == -1
    assert q4_0(-values)[0] == 1


def test_q8_0_rounds_to_the_nearest_step() -> None:
    values = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    found = q8_0(values)
    for block, rounded in zip(values.reshape(-1, BLOCK), found.reshape(-1, BLOCK), strict=True):
        step = np.abs(block).max() / 127
        assert np.abs(block - rounded).max() <= step * (0.5 + 127 * 2**-11)
    assert (q8_0(np.zeros((2, BLOCK), np.float32)) == 0).all()
