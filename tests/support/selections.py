"""Selections of positions, drawn at random, as tokens have them and as kernels do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.tensors import aligned_empty

WORD = 32


def drawn(random: np.random.Generator, position: int, share: float = 0.5) -> NDArray[np.bool_]:
    """``[position + 1]``: some positions, the token's own among them."""
    chosen = random.random(position + 1) < share
    chosen[-1] = True
    return chosen


def words_of(selections: Sequence[NDArray[np.bool_]], words: int) -> NDArray[Any]:
    """int32 ``[T, words]``, a bit a position."""
    bits = np.zeros((len(selections), words * WORD), np.uint64)
    for row, chosen in zip(bits, selections, strict=True):
        row[: len(chosen)] = chosen
    packed = (bits.reshape(len(selections), words, WORD) << np.arange(WORD, dtype=np.uint64)).sum(-1)
    result = aligned_empty((len(selections), words), "int32")
    result[...] = packed.astype(np.uint32).view(np.int32)
    return result


def bits_of(words: NDArray[Any]) -> NDArray[np.bool_]:
    """``[T, 32 words]``."""
    return ((words[..., None] >> np.arange(WORD)) & 1).astype(bool).reshape(len(words), -1)
