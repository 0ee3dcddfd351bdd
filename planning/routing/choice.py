"""Which policy suits the traces: candidates replayed on one half of them with the profile of the other half.

Dimension names: L layers of one shape, N tokens, K chosen experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.schedule import DEFAULT_POLICY, Policy
from moec.planning.routing.replay import (
    LayerReplay,
    Replay,
    by_use,
    optimal_distances,
    ranks_of,
    stack_distances,
    use_shares,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.schedule import Admission
    from moec.planning.policies import Integers
    from moec.planning.routing.replay import Group

LRU = Policy("lru", 0, 0, "always")
CANDIDATES = (
    LRU,
    Policy("lfru", 32, 0, "always"),
    Policy("lrfu", 4, 4, "always"),
    Policy("lrfu", 4, 8, "always"),
    DEFAULT_POLICY,
    Policy("lrfu", 4, 64, "always"),
    Policy("lfu", 16, 4096, "always"),
    Policy("lrfu", 4, 4, "better"),
    Policy("lrfu", 4, 8, "better"),
    Policy("lrfu", 4, 16, "better"),
    Policy("lrfu", 4, 64, "better"),
    Policy("lfu", 16, 4096, "better"),
    Policy("static", 16, 0, "better"),
)
"""The half-lives are those that won on some trace among 1 .. 4096; see docs/decisions/0009."""

LEAST_TOKENS = 64
"""With fewer traced tokens no policy is chosen by them."""
MOST_TOKENS = 512
"""Of each half: the order of the candidates settles before."""
JUDGED_SHARES = (0.1, 0.25, 0.5, 0.75)
"""Slots of each layer's experts with which the candidates are compared."""
SLACK = 0.005
"""A policy that falls short of LRU by more with any of these is not chosen."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Policies on tokens that their profile does not know."""

    candidates: tuple[Replay, ...]
    """The best first; of equal ones the simpler."""
    optimal: dict[Admission, Replay]
    """Belady's, on the same tokens."""

    def best(self, *, admitting: bool) -> Policy:
        """The best policy; with ``admitting`` among those that let every missed expert in."""
        for each in self.candidates:
            assert each.policy is not None
            if not admitting or each.policy.admission == "always":
                return each.policy
        return DEFAULT_POLICY


def compare(groups: Sequence[Group], policies: Sequence[Policy] = CANDIDATES) -> Comparison:
    """Replay ``policies`` on both halves of the tokens; see `Comparison`."""
    replays = [Replay(policy, _held_out(groups, policy)) for policy in policies]
    lru = next((replay for replay in replays if replay.policy == LRU), None)
    floor = [-1.0] * len(JUDGED_SHARES) if lru is None else _judged(lru)
    order = sorted(replays, key=lambda replay: -_worth(_judged(replay), floor))
    optimal: dict[Admission, Replay] = {
        "always": Replay(None, _held_out(groups, "always")),
        "better": Replay(None, _held_out(groups, "better")),
    }
    return Comparison(tuple(order), optimal)


def _worth(rates: Sequence[float], floor: Sequence[float]) -> float:
    """Mean hit rate; below 0 where a rate falls short of the floor."""
    short = any(rate < least - SLACK for rate, least in zip(rates, floor, strict=True))
    return round(float(np.mean(rates)), 4) - (1.0 if short else 0.0)


def _judged(replay: Replay) -> list[float]:
    """Hit rates with `JUDGED_SHARES` of each layer's experts."""
    return [
        float(np.mean([layer.curve[max(1, round(share * layer.experts))] for layer in replay.layers]))
        for share in JUDGED_SHARES
    ]


def _held_out(groups: Sequence[Group], how: Policy | Admission) -> tuple[LayerReplay, ...]:
    """Both halves, each with the profile of the other; under a policy, or under the optimum with an admission."""
    layers: dict[int, LayerReplay] = {}
    for group in groups:
        half = group.chosen.shape[1] // 2
        halves = group.chosen[:, :half], group.chosen[:, half:]
        parts = [
            _replayed(own[:, :MOST_TOKENS], other, group.experts, how)
            for own, other in (halves, halves[::-1])
        ]
        distances, ranks = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        for place, number in enumerate(group.numbers):
            layers[number] = LayerReplay(distances[place], ranks[place], group.experts)
    return tuple(layers[number] for number in sorted(layers))


def _replayed(
    own: Integers, other: Integers, experts: int, how: Policy | Admission
) -> tuple[Integers, Integers]:
    """Distances and ranks ``[L, N, K]`` of ``own`` with the profile of ``other``."""
    shares = use_shares(other, experts)
    order = by_use(shares)
    ranks = ranks_of(own, order)
    if isinstance(how, Policy):
        return stack_distances(how, own, order, shares), ranks
    return optimal_distances(own, order, how), ranks
