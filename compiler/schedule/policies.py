"""Cache policies, replayed on a trace for every number of slots at once.

All of them are stack algorithms (Mattson, Gecsei, Slutz, Traiger: Evaluation techniques for storage
hierarchies, IBM Systems Journal 1970): the score that decides who leaves does not depend on the number of
slots, so a cache of c + 1 slots always holds what one of c slots holds. One pass then gives, for each chosen
expert, the least number of slots with which it is a hit: its stack distance. Hit rates that grow with the
number of slots follow by construction.

Dimension names: N tokens, K chosen experts, E experts.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt


class Scorer(Protocol):
    """Scores experts while a trace is replayed; the least score leaves first."""

    def score(self, expert: int, token: int) -> float:
        """The score of an expert that ``token`` did not choose, before its choices are counted."""

    def use(self, expert: int, token: int) -> None:
        """Count that ``token`` chose ``expert``."""


class Lru:
    """The expert used longest ago leaves."""

    def __init__(self, trace: Sequence[Sequence[int]], prior_uses: Sequence[float]) -> None:
        del trace
        self._last = [-1] * len(prior_uses)

    def score(self, expert: int, token: int) -> float:
        """When it was last used."""
        del token
        return self._last[expert]

    def use(self, expert: int, token: int) -> None:
        """Remember when."""
        self._last[expert] = token


class Lfru:
    """The expert with the least ``uses / (age + 1)`` leaves; see ``artifacts.schedule.Policy``."""

    def __init__(self, trace: Sequence[Sequence[int]], prior_uses: Sequence[float]) -> None:
        del trace
        self._uses = list(prior_uses)
        self._last = [0] * len(prior_uses)

    def score(self, expert: int, token: int) -> float:
        """Uses over age."""
        return self._uses[expert] / (token - self._last[expert] + 1)

    def use(self, expert: int, token: int) -> None:
        """Count it and remember when."""
        self._uses[expert] += 1
        self._last[expert] = token


class Belady:
    """The expert whose next use is farthest off leaves: the optimum, which needs the future (Belady 1966)."""

    def __init__(self, trace: Sequence[Sequence[int]], prior_uses: Sequence[float]) -> None:
        self._tokens: list[list[int]] = [[] for _ in prior_uses]
        for token, chosen in enumerate(trace):
            for expert in chosen:
                self._tokens[expert].append(token)

    def score(self, expert: int, token: int) -> float:
        """Minus the token of its next use."""
        tokens = self._tokens[expert]
        place = bisect.bisect_right(tokens, token)
        return -tokens[place] if place < len(tokens) else -float("inf")

    def use(self, expert: int, token: int) -> None:
        """Nothing to count: the future is known."""


POLICIES: dict[str, Callable[[Sequence[Sequence[int]], Sequence[float]], Scorer]] = {
    "lru": Lru,
    "lfru": Lfru,
    "belady": Belady,
}
"""Policy name to scorer. ``belady`` is for comparison and cannot be scheduled."""


def stack_distances(
    policy: str, chosen: npt.NDArray[Any], order: Sequence[int], prior_uses: Sequence[float]
) -> npt.NDArray[np.int64]:
    """Replay ``chosen``: with c slots, seeded with ``order[:c]``, a choice hits where its distance is <= c.

    Args:
        policy: a key of ``POLICIES``.
        chosen: ``[N, K]`` experts.
        order: all E experts; decides ties, later leaves first.
        prior_uses: ``[E]``, by expert: uses to start with.

    Returns:
        Distances ``[N, K]``, 1..E.
    """
    trace: list[list[int]] = chosen.tolist()
    scorer = POLICIES[policy](trace, prior_uses)
    rank = {expert: place for place, expert in enumerate(order)}
    stack = list(order)
    distances = np.zeros(chosen.shape, np.int64)
    for token, experts in enumerate(trace):
        distances[token] = [stack.index(expert) + 1 for expert in experts]

        def key(expert: int, now: int = token) -> tuple[float, int]:
            return scorer.score(expert, now), -rank[expert]

        _replay_token(stack, experts, key)
        for expert in experts:
            scorer.use(expert, token)
    return distances


def _replay_token(stack: list[int], experts: list[int], key: Callable[[int], tuple[float, int]]) -> None:
    """Bring each of a token's experts in; what a cache of c slots then holds is ``stack[:c]``."""
    locked = set(experts)
    for expert in experts:
        place = stack.index(expert)
        top = 0
        while stack[top] in locked and top < place:
            top += 1
        if top == place:
            continue
        # stack[top] leaves a cache of top + 1 slots; it stays in a larger one that holds a lesser one.
        leaving = stack[top]
        leaving_key = key(leaving)
        stack[top] = expert
        for lower in range(top + 1, place):
            other = stack[lower]
            if other in locked:
                continue
            other_key = key(other)
            if other_key < leaving_key:
                stack[lower], leaving, leaving_key = leaving, other, other_key
        stack[place] = leaving


def hit_curve(distances: npt.NDArray[np.int64], experts: int) -> npt.NDArray[np.float64]:
    """Hit rate with 0..E slots, ``[E + 1]``, from stack distances."""
    counts = np.bincount(distances.ravel(), minlength=experts + 1)[: experts + 1]
    return np.cumsum(counts) / max(1, distances.size)
