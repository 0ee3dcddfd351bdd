"""How likely a token was, and which ones were likelier."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the probabilities that the model itself gives, before any option of sampling."""

    chosen: float
    """Of the token that was chosen."""
    top: tuple[tuple[int, float], ...]
    """Token ids and theirs, likeliest first; of equally likely ones the lower id."""


def token_logprobs(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprobs:
    """Of ``token`` and of the ``top`` likeliest ones, from logits float32 ``[V]``."""
    highest = float(logits.max())
    # Each term rounds to 24 bits; the sum must not.
    whole = highest + math.log(np.exp(logits - np.float32(highest)).sum(dtype=np.float64))
    best = _likeliest(logits, min(top, logits.size))
    return TokenLogprobs(
        float(logits[token]) - whole, tuple((place, float(logits[place]) - whole) for place in best)
    )


def _likeliest(logits: NDArray[np.float32], count: int) -> list[int]:
    """Places of the ``count`` largest logits, largest first; of equal ones the lower place."""
    if count < 2:
        return [int(logits.argmax())][:count]
    least = np.partition(logits, -count)[-count]
    places = np.flatnonzero(logits >= least)
    best: list[int] = places[np.argsort(-logits[places], kind="stable")][:count].tolist()
    return best
