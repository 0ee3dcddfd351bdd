"""Guesses of which experts the next MoE layer will choose, made when this layer has chosen: on traces, held out.

Dimension names: N tokens, K chosen experts of the guessed layer, E its experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.planning.routing.transitions import joint_counts

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from moec.artifacts.schedule import PrefetchSource
    from moec.artifacts.traces import Traces
    from moec.planning.policies import Integers


@dataclass(frozen=True, eq=False)
class Split:
    """Traced tokens to guess for, and others that the guesses are made from."""

    traces: Traces
    tokens: Integers
    """To guess for, N of them."""
    known: Integers
    """To learn from; none of ``tokens``."""


def halves(traces: Traces, tokens: Integers) -> tuple[Split, Split]:
    """Each half of ``tokens`` to guess for, with everything that was traced outside it to learn from."""
    middle = len(tokens) // 2
    everything = np.arange(traces.tokens)
    parts = tokens[:middle], tokens[middle:]
    first, second = (Split(traces, part, np.setdiff1d(everything, part)) for part in parts)
    return first, second


def by_transitions(split: Split, layer: int) -> Integers | None:
    """Those that tokens chose most which chose the same in the layer before: likeliest first, ``[N, K]``."""
    if layer == 0:
        return None
    before, own = split.traces.layers[layer - 1], split.traces.layers[layer]
    together = joint_counts(
        before.chosen[split.known], before.experts, own.chosen[split.known], own.experts
    ).astype(np.float64)
    together /= np.maximum(1, together.sum(axis=1, keepdims=True))
    scores = together[before.chosen[split.tokens].astype(np.int64)].sum(axis=1)
    return _likeliest(scores, own.chosen.shape[1])


def by_requests(split: Split, layer: int) -> Integers | None:
    """Those that the sequence used most which is most like this one so far: likeliest first, ``[N, K]``.

    Sequences are alike where their uses of all experts of all layers point the same way (the cosine, as in
    MoE-Infinity's collection of activation matrices). ``None`` where no other sequence is known.
    """
    traces = split.traces
    number = np.searchsorted(traces.sequence_starts, np.arange(traces.tokens), side="right") - 1
    uses = _uses(traces)
    others = np.unique(number[split.known])
    if len(others) < 2:
        return None
    collected = np.stack([uses[split.known[number[split.known] == other]].sum(axis=0) for other in others])
    own = traces.layers[layer]
    begin = sum(each.experts for each in traces.layers[:layer])
    so_far = np.cumsum(uses, axis=0)
    start = traces.sequence_starts[number[split.tokens]]
    history = so_far[split.tokens] - uses[split.tokens] - np.where(start[:, None] > 0, so_far[start - 1], 0)
    alike = _unit(history) @ _unit(collected).T
    # A sequence must not find itself: what is known of it may come after.
    alike[number[split.tokens][:, None] == others[None]] = -1
    matched = collected[alike.argmax(axis=1), begin : begin + own.experts]
    popular = collected[:, begin : begin + own.experts].sum(axis=0)
    return _likeliest(matched + popular / (1 + popular.sum()), own.chosen.shape[1])


def by_router(split: Split, layer: int) -> Integers | None:
    """What the layer's own router said of the hidden state one layer earlier; ``None`` where that was not traced.

    It was of the first tokens alone, of which ``split.tokens`` must be; see `guessable`.
    """
    early = split.traces.layers[layer].early
    return None if early is None else early[split.tokens].astype(np.int64)


SOURCES: dict[PrefetchSource, Callable[[Split, int], Integers | None]] = {
    "router": by_router,
    "transitions": by_transitions,
    "requests": by_requests,
}
"""Source to guess; each gives the experts of ``layer`` for ``split.tokens``, or ``None`` where it has none."""


def guessable(source: PrefetchSource, traces: Traces, layer: int, tokens: Integers) -> npt.NDArray[np.bool_]:
    """Which of ``tokens`` the source has a guess for: routers are asked of traced prompts, not in use."""
    early = traces.layers[layer].early
    return tokens < len(early) if source == "router" and early is not None else np.ones(len(tokens), np.bool_)


def _uses(traces: Traces) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Which experts of all layers each token chose, float32 ``[tokens, sum of E]``."""
    uses = np.zeros((traces.tokens, sum(layer.experts for layer in traces.layers)), np.float32)
    begin = 0
    for layer in traces.layers:
        np.put_along_axis(uses, begin + layer.chosen.astype(np.int64), 1, axis=1)
        begin += layer.experts
    return uses


def _unit(
    rows: np.ndarray[tuple[int, int], np.dtype[np.float32]],
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    lengths = np.maximum(1e-6, np.linalg.norm(rows, axis=1, keepdims=True))
    unit: np.ndarray[tuple[int, int], np.dtype[np.float32]] = rows / lengths
    return unit


def _likeliest(scores: np.ndarray[tuple[int, int], np.dtype[np.float64]], count: int) -> Integers:
    best: Integers = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return best
