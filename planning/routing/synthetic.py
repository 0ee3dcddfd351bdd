"""Made-up routing traces whose skew and locality are known.

Dimension names: L layers, N tokens, K chosen experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.traces import Traces, layer_trace

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from moec.artifacts.traces import LayerTrace


@dataclass(frozen=True)
class ZipfRouting:
    """Tokens that choose by popularity, by what the text is about at the moment, and by chance.

    The score of an expert is the logarithm of its popularity, rank to the power of minus ``exponent``, plus its
    standing with the topic, plus a Gumbel variable; a token chooses the K greatest. The topic is a Gaussian process
    for each expert that keeps ``exp(-1 / topic_tokens)`` of itself from token to token. Without a topic the choices of
    two tokens are independent.
    """

    exponent: float
    topic_deviation: float
    """Standard deviation of an expert's standing; 1 is as strong as the chance in each choice (1.28)."""
    topic_tokens: float
    """Tokens after which the topic has lost all but 1/e of itself."""


SKEWED = ZipfRouting(1.2, 0.5, 64)
"""Use is uneven and steady: half of 64 experts get 0.87 of the choices, and a token shares 0.35 of its six experts with
the one before."""
TOPICAL = ZipfRouting(1.0, 2.0, 256)
"""Use follows the topic: a token shares 0.46 of its six experts with the one before."""
SCATTERED = ZipfRouting(1.0, 0.0, 1)
"""Tokens choose independently of each other; 0.27 shared by popularity alone. The hardest for a cache."""


def zipf_traces(
    shapes: Sequence[tuple[int, int]], tokens: int, routing: ZipfRouting, seed: int = 0
) -> Traces:
    """Traces of one generated sequence; layers are independent of each other.

    Args:
        shapes: (E, K) of each layer.
        tokens: N.
        routing: how tokens choose.
        seed: of the random numbers; the same gives the same traces.
    """
    random = np.random.default_rng(seed)
    layers = tuple(layer_trace(E, _choices(random, E, K, tokens, routing)) for E, K in shapes)
    return Traces(layers, np.zeros(1 if tokens else 0, np.int64), np.zeros(tokens, np.bool_))


def overlap(trace: LayerTrace) -> float:
    """Locality as one number: the share of its experts that a token shares with the token before it."""
    chosen = np.asarray(trace.chosen)
    if len(chosen) < 2:
        return 0.0
    same = (chosen[1:, :, None] == chosen[:-1, None, :]).any(axis=2)
    return float(same.mean())


def _choices(
    random: np.random.Generator, experts: int, top_k: int, tokens: int, routing: ZipfRouting
) -> npt.NDArray[Any]:
    popularity = -routing.exponent * np.log(1 + random.permutation(experts))
    kept = float(np.exp(-1 / routing.topic_tokens))
    topic = random.normal(size=experts)
    chosen = np.empty((tokens, top_k), np.int64)
    for token in range(tokens):
        topic = kept * topic + np.sqrt(1 - kept * kept) * random.normal(size=experts)
        score = popularity + routing.topic_deviation * topic + random.gumbel(size=experts)
        chosen[token] = np.argsort(-score)[:top_k]
    return chosen
