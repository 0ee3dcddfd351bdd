"""Random numbers that depend on a seed and a counter alone, so that every device draws the same.

Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011);
``compiler/kernels/cuda/sample/philox.py`` is the same on a GPU.
"""

from __future__ import annotations

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = (1 << 32) - 1


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random words of 32 bits."""
    a, b, c, d = counter
    low, high = key
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> 32) ^ b ^ low, second & _WORD, (first >> 32) ^ d ^ high, first & _WORD
        low, high = (low + _WEYL[0]) & _WORD, (high + _WEYL[1]) & _WORD
    return a, b, c, d


def uniform(seed: int, counter: int) -> float:
    """The number in [0, 1), of 53 bits, for a seed (modulo 2**64) and a counter below 2**64."""
    words = philox((counter & _WORD, counter >> 32, 0, 0), (seed & _WORD, seed >> 32 & _WORD))
    return float((words[1] << 32 | words[0]) >> 11) * 2.0**-53
