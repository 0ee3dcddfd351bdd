"""What routing traces say about a model: the profile for the bundle, and distances for the planner.

Dimension names: N replayed tokens, K chosen experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.schedule import DEFAULT_PRIOR_TOKENS, LayerProfile, Policy, RoutingProfile
from moec.compiler.schedule.policies import stack_distances
from moec.errors import BundleError

if TYPE_CHECKING:
    import numpy.typing as npt

    from moec.artifacts.ids import LayerId
    from moec.artifacts.model import ExpertsLayer, ModelRecord
    from moec.artifacts.schedule import PolicyName
    from moec.artifacts.traces import Traces

REPLAY_TOKENS = 1024
"""At most so many of the last traced tokens are replayed: the curves settle long before."""

TRANSITIONS = 4
"""Likely next experts kept for each expert."""


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """One MoE layer's replay."""

    distances: npt.NDArray[np.int64]
    """``[N, K]``: the least number of slots with which the choice is a hit."""
    ranks: npt.NDArray[np.int64]
    """``[N, K]``: the chosen expert's place in the profile's order."""


@dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that the planner takes from traces; independent of budgets and machines."""

    profile: RoutingProfile
    policy: Policy
    layers: tuple[LayerAnalysis, ...]


def analyse(traces: Traces | None, model: ModelRecord, policy: PolicyName = "lfru") -> Analysis:
    """Profile and replay ``traces``; with ``None``, take every expert to be used alike.

    Raises:
        BundleError: the traces are of another model.
    """
    prior_tokens = DEFAULT_PRIOR_TOKENS if policy == "lfru" else 0
    if traces is None or traces.tokens == 0:
        profile = RoutingProfile("uniform", 0, 0, tuple(_uniform_profile(layer) for layer in model.experts))
        layers = tuple(_uniform_replay(layer.experts, layer.top_k) for layer in model.experts)
        return Analysis(profile, Policy(policy, prior_tokens), layers)
    _check_traces(traces, model)
    profile = RoutingProfile(
        "traced", traces.tokens, len(traces.sequence_starts), _traced_profiles(traces, model)
    )
    # Generated tokens are what the cache will serve; prompts pass by it in a stream.
    decoded = np.flatnonzero(~traces.prefill)
    tokens = (decoded if len(decoded) else np.arange(traces.tokens))[-REPLAY_TOKENS:]
    layers = tuple(
        _replay(traces.layers[layer.layer].chosen[tokens], layer, policy, prior_tokens)
        for layer in profile.layers
    )
    return Analysis(profile, Policy(policy, prior_tokens), layers)


def _check_traces(traces: Traces, model: ModelRecord) -> None:
    found = [(layer.experts, layer.chosen.shape[1]) for layer in traces.layers]
    expected = [(layer.experts, layer.top_k) for layer in model.experts]
    if found != expected:
        raise BundleError(
            "The routing traces are of another model.",
            f"They have {len(found)} MoE layers, the model {len(expected)}, or the experts differ.",
            "Compile the model again.",
        )


def _traced_profiles(traces: Traces, model: ModelRecord) -> tuple[LayerProfile, ...]:
    profiles: list[LayerProfile] = []
    for layer in model.experts:
        chosen = traces.layers[layer.layer].chosen
        counts = np.bincount(chosen.ravel(), minlength=layer.experts)
        order = np.argsort(-counts, kind="stable")
        share = counts[order] / traces.tokens
        transitions: tuple[tuple[int, ...], ...] = ()
        if layer.layer + 1 < len(model.experts):
            following = traces.layers[layer.layer + 1]
            transitions = _transitions(chosen, layer.experts, following.chosen, following.experts)
        profiles.append(LayerProfile(layer.layer, tuple(order.tolist()), tuple(share.tolist()), transitions))
    return tuple(profiles)


def _transitions(
    chosen: npt.NDArray[Any], experts: int, following: npt.NDArray[Any], following_experts: int
) -> tuple[tuple[int, ...], ...]:
    """For each expert, up to ``TRANSITIONS`` experts of the next layer that the same tokens chose most."""
    together = np.zeros((experts, following_experts), np.int64)
    for here in range(chosen.shape[1]):
        for there in range(following.shape[1]):
            np.add.at(together, (chosen[:, here], following[:, there]), 1)
    best = np.argsort(-together, axis=1, kind="stable")[:, :TRANSITIONS]
    return tuple(
        tuple(int(expert) for expert in row if together[source, expert] > 0)
        for source, row in enumerate(best)
    )


def _replay(
    chosen: npt.NDArray[Any], profile: LayerProfile, policy: PolicyName, prior_tokens: int
) -> LayerAnalysis:
    prior, rank = [0.0] * len(profile.order), np.zeros(len(profile.order), np.int64)
    for place, (expert, share) in enumerate(zip(profile.order, profile.use_share, strict=True)):
        prior[expert], rank[expert] = prior_tokens * share, place
    return LayerAnalysis(stack_distances(policy, chosen, profile.order, prior), rank[chosen])


def _uniform_profile(layer: ExpertsLayer) -> LayerProfile:
    number: LayerId = layer.layer
    share = layer.top_k / layer.experts
    return LayerProfile(number, tuple(range(layer.experts)), (share,) * layer.experts, ())


def _uniform_replay(experts: int, top_k: int) -> LayerAnalysis:
    """E made-up tokens of K distinct choices, every expert chosen K times, so that c slots hit c / E."""
    token = np.arange(experts)[:, None]
    choice = np.arange(top_k)[None, :] * (experts // top_k)
    ranks = (token + choice) % experts
    return LayerAnalysis(ranks + 1, ranks)
