"""What routing traces say about a model: the profile for the bundle, and distances for the planner.

Dimension names: N replayed tokens, K chosen experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.schedule import DEFAULT_POLICY, LayerProfile, RoutingProfile
from moec.errors import BundleError
from moec.planning import choice
from moec.planning.allocate import hull_rates
from moec.planning.replay import alike, hit_curve, optimal_distances, stack_distances
from moec.planning.transitions import likely_next

if TYPE_CHECKING:
    import numpy.typing as npt

    from moec.artifacts.model import ExpertsLayer, ModelRecord
    from moec.artifacts.schedule import Policy
    from moec.artifacts.traces import Traces
    from moec.planning.choice import Candidate
    from moec.planning.policies import Integers

REPLAY_TOKENS = 1024
"""At most so many of the last traced tokens are replayed: the curves settle long before."""


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """One MoE layer's replay under one policy."""

    distances: Integers
    """``[N, K]``: the least number of slots with which the choice is a hit."""
    ranks: Integers
    """``[N, K]``: the chosen expert's place in the profile's order."""
    optimal: npt.NDArray[np.float64]
    """``[E + 1]``: the hit rate with 0..E slots under Belady's optimum, with the policy's admission."""


@dataclass(frozen=True, eq=False)
class Replay:
    """All MoE layers under one policy."""

    policy: Policy
    layers: tuple[LayerAnalysis, ...]


@dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that the planner takes from traces; independent of budgets and machines."""

    profile: RoutingProfile
    device: Replay
    """Under the policy for slots on a GPU."""
    host: Replay
    """Under the policy for host memory, which must let every missed expert in."""
    candidates: tuple[Candidate, ...]
    """What the policies were chosen from, the best first; none where too little was traced."""


def analyse(traces: Traces | None, model: ModelRecord, policy: Policy | None = None) -> Analysis:
    """Profile and replay ``traces``; with ``None``, take every expert to be used alike.

    Args:
        traces: of this model.
        model: the model.
        policy: to replay; ``None``: the one that suits the traces best.

    Raises:
        BundleError: the traces are of another model.
    """
    if traces is None or traces.tokens == 0:
        return _uniform(model, policy or DEFAULT_POLICY)
    check_traces(traces, model)
    tokens = replayed_tokens(traces)
    groups = [
        (
            numbers,
            np.stack([traces.layers[number].chosen[tokens] for number in numbers]).astype(np.int64),
            model.experts[numbers[0]].experts,
        )
        for numbers in alike([(layer.experts, layer.top_k) for layer in model.experts])
    ]
    candidates = () if policy else choice.compare(groups, len(model.experts))
    device = policy or choice.best(candidates, admitting=False)
    host = policy or choice.best(candidates, admitting=True)
    shares = [
        choice.use_shares(layer.chosen[None].astype(np.int64), layer.experts)[0] for layer in traces.layers
    ]
    orders = [np.argsort(-share, kind="stable") for share in shares]
    on_device = _replay(device, groups, orders, shares)
    on_host = on_device if host == device else _replay(host, groups, orders, shares)
    profile = RoutingProfile(
        "traced",
        traces.tokens,
        len(traces.sequence_starts),
        tuple(
            LayerProfile(
                layer.layer,
                tuple(order.tolist()),
                tuple(share[order].tolist()),
                slot_values(replay.distances, layer.experts),
                likely_next(traces, layer.layer),
            )
            for layer, order, share, replay in zip(
                model.experts, orders, shares, on_device.layers, strict=True
            )
        ),
    )
    return Analysis(profile, on_device, on_host, candidates)


def replayed_tokens(traces: Traces) -> Integers:
    """Numbers of the tokens to replay: generated ones are what a cache serves; prompts pass by it in a stream."""
    decoded = np.flatnonzero(~traces.prefill)
    return (decoded if len(decoded) else np.arange(traces.tokens))[-REPLAY_TOKENS:]


def slot_values(distances: Integers, experts: int) -> tuple[float, ...]:
    """Chosen experts of a token that each further slot turns into hits, on the convex hull: never rising, ``[E]``."""
    misses = distances.shape[1] * (1 - hit_curve(distances, experts))
    return tuple(float(value) for value in np.round(hull_rates(misses), 6))


def check_traces(traces: Traces, model: ModelRecord) -> None:
    """Raise `BundleError` where the traces are of another model."""
    found = [(layer.experts, layer.chosen.shape[1]) for layer in traces.layers]
    expected = [(layer.experts, layer.top_k) for layer in model.experts]
    if found != expected:
        raise BundleError(
            "The routing traces are of another model.",
            f"They have {len(found)} MoE layers, the model {len(expected)}, or the experts differ.",
            "Use traces of this model, or compile it again.",
        )


def _replay(
    policy: Policy,
    groups: list[tuple[list[int], Integers, int]],
    orders: list[Integers],
    shares: list[npt.NDArray[np.float64]],
) -> Replay:
    layers: dict[int, LayerAnalysis] = {}
    for numbers, chosen, experts in groups:
        order, share = (np.stack([each[number] for number in numbers]) for each in (orders, shares))
        distances = stack_distances(policy, chosen, order, share)
        optimal = optimal_distances(chosen, order, policy.admission)
        ranks = np.argsort(order, axis=1)
        for place, number in enumerate(numbers):
            curve = hit_curve(optimal[place], experts)
            layers[number] = LayerAnalysis(distances[place], ranks[place][chosen[place]], curve)
    return Replay(policy, tuple(layers[number] for number in sorted(layers)))


def _uniform(model: ModelRecord, policy: Policy) -> Analysis:
    """Every expert used alike, so that c slots hit c / E of the choices, whatever the policy."""
    profiles, layers = [], []
    for layer in model.experts:
        share = (layer.top_k / layer.experts,) * layer.experts
        profiles.append(LayerProfile(layer.layer, tuple(range(layer.experts)), share, share, ()))
        layers.append(_uniform_replay(layer))
    replay = Replay(policy, tuple(layers))
    return Analysis(RoutingProfile("uniform", 0, 0, tuple(profiles)), replay, replay, ())


def _uniform_replay(layer: ExpertsLayer) -> LayerAnalysis:
    """E made-up tokens of K distinct choices, every expert chosen K times."""
    token = np.arange(layer.experts)[:, None]
    place = np.arange(layer.top_k)[None, :] * (layer.experts // layer.top_k)
    ranks = (token + place) % layer.experts
    return LayerAnalysis(ranks + 1, ranks, np.arange(layer.experts + 1) / layer.experts)
