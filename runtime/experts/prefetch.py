"""Experts brought before their layer's router has spoken, by a guess made in the MoE layer before.

T tokens, K chosen experts, E experts, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from moec.artifacts.words.ahead import MOST_TOKENS
from moec.errors import RequestError
from moec.runtime.routing.early_router import early_routers, likeliest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.schedule import PrefetchPlan, PrefetchSource, RoutingProfile
    from moec.runtime.routing.early_router import Routers
    from moec.runtime.stats import Stats

    Guess: TypeAlias = Callable[[int, NDArray[np.float32], NDArray[np.int64]], NDArray[np.int64] | None]
    """Of a MoE layer, its hidden states ``[T, H]`` and its choices ``[T, K]``: the next layer's likely experts
    ``[T, K']``, likeliest first; ``None``: no idea."""


class Prefetcher:
    """Guesses the next layer's experts, and counts how good the guesses were.

    Args:
        guess: how.
        layers: MoE layers of the model.
        limit: most experts to bring ahead for one layer.
        stats: gets the counts.
    """

    def __init__(self, guess: Guess, layers: int, limit: int, stats: Stats) -> None:
        self.limit = limit
        self._guess, self._layers, self._stats = guess, layers, stats
        self._open: tuple[int, NDArray[np.int64]] | None = None
        self._brought: list[int] = []
        self._stride = 0

    def next_experts(self, layer: int, hidden: NDArray[np.float32], chosen: NDArray[np.int64]) -> list[int]:
        """Experts of ``layer + 1``, likeliest first, now that ``layer`` has chosen ``chosen`` ``[T, K]``."""
        self._open = None
        if layer + 1 >= self._layers or len(chosen) > MOST_TOKENS:
            return []
        guessed = self._guess(layer, hidden, chosen)
        if guessed is None:
            return []
        self._open = layer + 1, guessed
        # The likeliest of every token before the second of any.
        return list(dict.fromkeys(guessed.T.ravel().tolist()))

    def brought(self, experts: Sequence[int], stride_bytes: int) -> None:
        """Count experts that are on their way; what of them nobody chooses counts as wasted at the next `check`."""
        self._brought, self._stride = list(experts), stride_bytes
        self._stats.prefetch.fetched_bytes += len(experts) * stride_bytes

    def check(self, layer: int, chosen: NDArray[np.int64]) -> None:
        """Hold the guess for ``layer`` against its choices ``[T, K]``."""
        counts, made = self._stats.prefetch, self._open
        if made is None or made[0] != layer or len(made[1]) != len(chosen):
            return
        right = (chosen[:, :, None] == made[1][:, None, :]).any(axis=2)
        counts.chosen += right.size
        counts.right += int(right.sum())
        counts.tokens += len(right)
        counts.exact += int(right.all(axis=1).sum())
        counts.wasted_bytes += self._stride * len(set(self._brought) - set(chosen.ravel().tolist()))
        self._open, self._brought = None, []


def make_prefetcher(
    bundle: Bundle, plan: PrefetchPlan, wanted: bool | None, stats: Stats
) -> Prefetcher | None:
    """The prefetcher for the CPU's store, or ``None`` where it is off.

    Args:
        bundle: the model.
        plan: of the schedule that the model runs by.
        wanted: ``None``: as the schedule says; True: on, by the schedule's source or else by the candidate of the best
            recall; False: off.
        stats: gets the counts.

    Raises:
        RequestError: it is wanted, and there is nothing to guess by.
    """
    if wanted is False or (wanted is None and plan.source == "none"):
        return None
    layers = bundle.model.experts
    source, limit = (
        plan.source,
        plan.bytes_per_layer
        // max(1, max((bundle.expert_layout(layer.layer).stride_bytes for layer in layers), default=1)),
    )
    if source == "none":
        recalls = {each.source: each.recall for each in plan.candidates if each.source in GUESSES}
        source = max(recalls, key=lambda name: recalls[name], default="transitions")
    guess = GUESSES[source](bundle) if source in GUESSES else None
    if guess is None:
        raise nothing_to_guess_by()
    return Prefetcher(guess, len(layers), limit or max(layer.top_k for layer in layers), stats)


def nothing_to_guess_by() -> RequestError:
    """For prefetching that is wanted of a bundle that knows no guess."""
    return RequestError(
        "prefetch=True has nothing to guess by.",
        "The bundle was compiled without calibration, so it does not know which experts follow which.",
        "Leave prefetch out, or compile the model again with calibration.",
    )


def transition_votes(profile: RoutingProfile) -> list[NDArray[np.float32]]:
    """By MoE layer but the last, float32 ``[E, E of the next]``: the votes of each expert for those that follow it."""
    votes = [
        np.zeros((len(layer.order), len(after.order)), np.float32)
        for layer, after in zip(profile.layers, profile.layers[1:], strict=False)
    ]
    for table, layer in zip(votes, profile.layers, strict=False):
        for expert, following in enumerate(layer.transitions):
            table[expert, list(following)] = 1 / np.arange(1, len(following) + 1)
    return votes


def by_transitions(profile: RoutingProfile, top_k: Sequence[int]) -> Guess | None:
    """Guesses by the profile's table of which experts follow which; ``None`` where it is empty."""
    votes = transition_votes(profile)
    if not any(table.any() for table in votes):
        return None

    def guess(layer: int, hidden: NDArray[np.float32], chosen: NDArray[np.int64]) -> NDArray[np.int64] | None:
        del hidden
        return likeliest(votes[layer][chosen].sum(axis=1), top_k[layer + 1])

    return guess


def by_router(routers: Routers, top_k: Sequence[int]) -> Guess | None:
    """Guesses by the next layer's router, applied to this layer's hidden state; ``None`` where no router is known."""
    if not any(router is not None for router in routers[1:]):
        return None

    def guess(layer: int, hidden: NDArray[np.float32], chosen: NDArray[np.int64]) -> NDArray[np.int64] | None:
        del chosen
        router = routers[layer + 1]
        return None if router is None else likeliest(hidden @ router.T, top_k[layer + 1])

    return guess


def _transitions_of(bundle: Bundle) -> Guess | None:
    return by_transitions(bundle.schedule.profile, [layer.top_k for layer in bundle.model.experts])


def _router_of(bundle: Bundle) -> Guess | None:
    return by_router(early_routers(bundle), [layer.top_k for layer in bundle.model.experts])


GUESSES: dict[PrefetchSource, Callable[[Bundle], Guess | None]] = {
    "transitions": _transitions_of,
    "router": _router_of,
}
"""Sources that the CPU's store can follow."""
