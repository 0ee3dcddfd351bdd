from __future__ import annotations

import numpy as np
import pytest

from moec.runtime.randoms import philox, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert philox(counter, key) == expected


def test_numbers_are_uniform_and_differ_by_seed_and_counter() -> None:
    numbers = np.array([[uniform(seed, counter) for counter in range(100)] for seed in range(40)])
    assert len(set(numbers.ravel().tolist())) == 4000
    assert 0 <= numbers.min() < 0.005
    assert 0.995 < numbers.max() < 1
    np.testing.assert_allclose(np.histogram(numbers, 8, (0, 1))[0] / 4000, 1 / 8, atol=0.02)


def test_seeds_count_modulo_64_bits() -> None:
    assert uniform(2**64 + 5, 1) == uniform(5, 1) != uniform(2**32 + 5, 1)
