"""Which experts of the next MoE layer the tokens chose that chose an expert of this one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.traces import repeats

if TYPE_CHECKING:
    import numpy.typing as npt

    from moec.artifacts.traces import Traces
    from moec.planning.policies import Integers

TRANSITIONS = 4
"""Likely next experts kept for each expert."""


def likely_next(traces: Traces, layer: int) -> tuple[tuple[int, ...], ...]:
    """For each expert of ``layer``, up to `TRANSITIONS` of the next layer, likeliest first; empty in the last one."""
    if layer + 1 >= len(traces.layers):
        return ()
    here, following = traces.layers[layer], traces.layers[layer + 1]
    together = joint_counts(here.chosen, here.experts, following.chosen, following.experts)
    best = np.argsort(-together, axis=1, kind="stable")[:, :TRANSITIONS]
    return tuple(
        tuple(int(expert) for expert in row if together[source, expert] > 0)
        for source, row in enumerate(best)
    )


def joint_counts(
    chosen: npt.NDArray[Any], experts: int, following: npt.NDArray[Any], following_experts: int
) -> Integers:
    """How many tokens chose expert i of one layer and expert j of another, ``[E, E']``.

    Args:
        chosen: ``[N, K]`` of one layer.
        experts: E of that layer.
        following: ``[N, K']`` of the other.
        following_experts: E' of that one.
    """
    together = np.zeros((experts, following_experts), np.int64)
    first, first_following = ~repeats(chosen), ~repeats(following)
    for here in range(chosen.shape[1]):
        for there in range(following.shape[1]):
            both = first[:, here] & first_following[:, there]
            np.add.at(together, (chosen[both, here], following[both, there]), 1)
    return together
