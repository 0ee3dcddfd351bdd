"""How likely a token was, and which ones were likelier."""

from __future__ import annotations

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
    wide = logits.astype(np.float64)
    highest = float(wide.max())
    wide -= highest + np.log(np.exp(wide - highest).sum())
    count = min(top, wide.size)
    if count == 0:
        return TokenLogprobs(float(wide[token]), ())
    least = np.partition(wide, -count)[-count]
    places = np.flatnonzero(wide >= least)
    best = places[np.argsort(-wide[places], kind="stable")][:count]
    return TokenLogprobs(float(wide[token]), tuple((int(place), float(wide[place])) for place in best))
