"""What routing traces say about a model: the profile for the bundle, and distances for the planner.

Dimension names: N replayed tokens, K chosen experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.schedule import DEFAULT_POLICY, LayerProfile, RoutingProfile
from moec.planning.policies import always_admitting
from moec.planning.routing.allocate import hull_rates
from moec.planning.routing.choice import LEAST_TOKENS, Comparison, compare
from moec.planning.routing.replay import (
    LayerReplay,
    Replay,
    by_use,
    optimal_distances,
    ranks_of,
    stack_distances,
    use_shares,
)
from moec.planning.routing.sides import layer_traces, replayed_groups, sides_of, transitions

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from moec.artifacts.model import ExpertsLayer, ModelRecord
    from moec.artifacts.schedule import Policy
    from moec.artifacts.traces import Traces
    from moec.planning.policies import Integers
    from moec.planning.routing.replay import Group


@dataclass(frozen=True, eq=False)
class Tier:
    """Replays for one tier."""

    policy: Policy
    replay: Replay
    """Under the policy."""
    optimal: Replay
    """Under Belady's optimum, with the policy's admission."""


@dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that the planner takes from traces; independent of budgets and machines."""

    profile: RoutingProfile
    traces: Traces | None
    tokens: Integers
    """Numbers of the traced tokens that were replayed, of the decoder where there is an encoder."""
    device: Tier
    """Slots on a GPU."""
    host: Tier
    """Host memory of the CPU alone, whose policy must let every missed expert in."""
    comparison: Comparison | None
    """What the policies were chosen from; ``None`` where too little was traced, or a policy was given."""


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
    sides = sides_of(traces, model)
    tokens, groups, layers = sides[-1].replayed, replayed_groups(sides), layer_traces(sides)
    comparison = compare(groups) if policy is None and len(tokens) >= LEAST_TOKENS else None
    device = host = policy or DEFAULT_POLICY
    if comparison is not None:
        device, host = comparison.best(admitting=False), comparison.best(admitting=True)
    shares = [use_shares(layer.chosen[None].astype(np.int64), layer.experts)[0] for layer in layers]
    on_device = _tier(device, groups, shares)
    host = always_admitting(host)
    on_host = on_device if host == device else _tier(host, groups, shares)
    following = transitions(sides)
    profile = RoutingProfile(
        "traced",
        sum(side.traces.tokens for side in sides),
        len(traces.sequence_starts),
        tuple(
            _layer_profile(layer, share, replay, following[layer.layer])
            for layer, share, replay in zip(model.experts, shares, on_device.replay.layers, strict=True)
        ),
    )
    return Analysis(profile, traces, tokens, on_device, on_host, comparison)


def _layer_profile(
    layer: ExpertsLayer,
    share: npt.NDArray[np.float64],
    replay: LayerReplay,
    transitions: tuple[tuple[int, ...], ...],
) -> LayerProfile:
    order = by_use(share)
    # On the convex hull of the misses, so that slots are worth less and less.
    values = np.round(hull_rates(layer.top_k * (1 - replay.curve)), 6)
    return LayerProfile(
        layer.layer, tuple(order.tolist()), tuple(share[order].tolist()), tuple(values.tolist()), transitions
    )


def _tier(policy: Policy, groups: Sequence[Group], shares: list[npt.NDArray[np.float64]]) -> Tier:
    replayed: dict[int, LayerReplay] = {}
    optimal: dict[int, LayerReplay] = {}
    for group in groups:
        share = np.stack([shares[number] for number in group.numbers])
        order = by_use(share)
        ranks = ranks_of(group.chosen, order)
        distances = stack_distances(policy, group.chosen, order, share)
        best = optimal_distances(group.chosen, order, policy.admission)
        for place, number in enumerate(group.numbers):
            replayed[number] = LayerReplay(distances[place], ranks[place], group.experts)
            optimal[number] = LayerReplay(best[place], ranks[place], group.experts)
    layers, best_layers = (tuple(each[n] for n in sorted(each)) for each in (replayed, optimal))
    return Tier(policy, Replay(policy, layers), Replay(None, best_layers))


def _uniform(model: ModelRecord, policy: Policy) -> Analysis:
    """Every expert used alike, so that c slots hit c / E of the choices, whatever the policy."""
    profiles = []
    for layer in model.experts:
        share = (layer.top_k / layer.experts,) * layer.experts
        profiles.append(LayerProfile(layer.layer, tuple(range(layer.experts)), share, share, ()))
    layers = tuple(_uniform_replay(layer) for layer in model.experts)
    device = Tier(policy, Replay(policy, layers), Replay(None, layers))
    admitting = always_admitting(policy)
    host = Tier(admitting, Replay(admitting, layers), Replay(None, layers))
    return Analysis(
        RoutingProfile("uniform", 0, 0, tuple(profiles)), None, np.zeros(0, np.int64), device, host, None
    )


def _uniform_replay(layer: ExpertsLayer) -> LayerReplay:
    """E made-up tokens of K distinct choices, every expert chosen K times."""
    token = np.arange(layer.experts)[:, None]
    place = np.arange(layer.top_k)[None, :] * (layer.experts // layer.top_k)
    ranks = (token + place) % layer.experts
    return LayerReplay(ranks + 1, ranks, layer.experts)
