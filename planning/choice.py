"""Which policy suits the traces: candidates replayed on one half of them with the profile of the other half.

Dimension names: L layers of one shape, N tokens, K chosen experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.schedule import DEFAULT_POLICY, Policy
from moec.planning.replay import hit_curve, stack_distances

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from moec.planning.policies import Integers

CANDIDATES = (
    Policy("lru", 0, 0, "always"),
    Policy("lfru", 32, 0, "always"),
    Policy("lrfu", 4, 4, "always"),
    Policy("lrfu", 4, 8, "always"),
    DEFAULT_POLICY,
    Policy("lrfu", 4, 64, "always"),
    Policy("lfu", 16, 4096, "always"),
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
JUDGED_SHARES = (0.25, 0.5)
"""Slots of each layer's experts with which the candidates are compared: where caching decides the most."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A policy's hit rates on tokens that its profile does not know."""

    policy: Policy
    curves: tuple[npt.NDArray[np.float64], ...]
    """For each MoE layer, the hit rate with 0..E slots, ``[E + 1]``."""

    @property
    def worth(self) -> float:
        """Mean hit rate over layers and `JUDGED_SHARES`."""
        rates = [curve[round(share * (len(curve) - 1))] for curve in self.curves for share in JUDGED_SHARES]
        return float(np.mean(rates))


def compare(groups: Sequence[tuple[list[int], Integers, int]], layers: int) -> tuple[Candidate, ...]:
    """Replay the candidates; nothing where there are too few tokens to tell them apart.

    Args:
        groups: layer numbers, their choices ``[L, N, K]``, and E; all layers are in one of them.
        layers: how many there are.

    Returns:
        The best first; of equal ones the simpler.
    """
    if not groups or groups[0][1].shape[1] < LEAST_TOKENS:
        return ()
    found = []
    for policy in CANDIDATES:
        curves: list[npt.NDArray[np.float64]] = [np.zeros(1)] * layers
        for numbers, chosen, experts in groups:
            for number, curve in zip(numbers, _held_out(policy, chosen, experts), strict=True):
                curves[number] = curve
        found.append(Candidate(policy, tuple(curves)))
    return tuple(sorted(found, key=lambda each: -round(each.worth, 4)))


def best(candidates: Sequence[Candidate], *, admitting: bool) -> Policy:
    """The best policy; with ``admitting`` among those that let every missed expert in."""
    fitting = [each.policy for each in candidates if not admitting or each.policy.admission == "always"]
    return fitting[0] if fitting else DEFAULT_POLICY


def _held_out(policy: Policy, chosen: Integers, experts: int) -> list[npt.NDArray[np.float64]]:
    half = chosen.shape[1] // 2
    parts = chosen[:, :half], chosen[:, half:]
    distances = []
    for own, other in (parts, parts[::-1]):
        shares = use_shares(other, experts)
        order = np.argsort(-shares, axis=1, kind="stable")
        distances.append(stack_distances(policy, own[:, :MOST_TOKENS], order, shares))
    joined = np.concatenate(distances, axis=1)
    return [hit_curve(layer, experts) for layer in joined]


def use_shares(chosen: Integers, experts: int) -> npt.NDArray[np.float64]:
    """Share of tokens that chose each expert, ``[L, E]``, by expert number."""
    counts = [np.bincount(layer.ravel(), minlength=experts) for layer in chosen]
    return np.stack(counts) / max(1, chosen.shape[1])
