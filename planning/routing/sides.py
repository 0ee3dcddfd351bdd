"""The routing traces of a model's sides: a decoder's, and an encoder's where there is one, each over its own tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.layout.footprint import encoder_experts
from moec.errors import BundleError
from moec.planning.routing.replay import group_layers
from moec.planning.routing.transitions import likely_next

if TYPE_CHECKING:
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.traces import LayerTrace, Traces
    from moec.planning.policies import Integers
    from moec.planning.routing.replay import Group

REPLAY_TOKENS = 1024
"""At most so many of the last traced tokens are replayed: the curves settle long before."""


@dataclass(frozen=True, eq=False)
class Side:
    """MoE layers that the same tokens meet."""

    traces: Traces
    layers: tuple[int, ...]
    """Ordinals in the model of the traces' layers."""

    @property
    def replayed(self) -> Integers:
        """Numbers of the tokens to replay: see `replayed_tokens`."""
        return replayed_tokens(self.traces)


def sides_of(traces: Traces, model: ModelRecord) -> tuple[Side, ...]:
    """The sides, the decoder's last; one side for all layers where the traces do not tell an encoder's tokens.

    Raises:
        BundleError: the traces are of another model.
    """
    everything = tuple(range(len(model.experts)))
    sides: tuple[Side, ...] = (Side(traces, everything),)
    if traces.encoder is not None:
        own = encoder_experts(model)
        decoder = tuple(number for number in everything if number not in own)
        sides = (Side(traces.encoder, own), Side(traces, decoder))
    for side in sides:
        found = [(layer.experts, layer.chosen.shape[1]) for layer in side.traces.layers]
        expected = [(model.experts[number].experts, model.experts[number].top_k) for number in side.layers]
        if found != expected:
            raise BundleError(
                "The routing traces are of another model.",
                f"They have {len(found)} MoE layers, the model {len(expected)}, or the experts differ.",
                "Use traces of this model, or compile it again.",
            )
    return sides


def replayed_tokens(traces: Traces) -> Integers:
    """Numbers of the tokens to replay: generated ones are what a cache serves; prompts pass by it in a stream.

    Where nothing was generated, as in an encoder, all tokens.
    """
    decoded = np.flatnonzero(~traces.prefill)
    return (decoded if len(decoded) else np.arange(traces.tokens))[-REPLAY_TOKENS:]


def replayed_groups(sides: tuple[Side, ...]) -> tuple[Group, ...]:
    """The choices of each side's tokens that are replayed, layers of the same side and shape together."""
    return tuple(
        replace(group, numbers=tuple(side.layers[number] for number in group.numbers))
        for side in sides
        for group in group_layers(side.traces, side.replayed)
    )


def layer_traces(sides: tuple[Side, ...]) -> tuple[LayerTrace, ...]:
    """The traces of all MoE layers in the model's order; those of different sides are over different tokens."""
    found = {
        number: layer for side in sides for number, layer in zip(side.layers, side.traces.layers, strict=True)
    }
    return tuple(found[number] for number in sorted(found))


def transitions(sides: tuple[Side, ...]) -> dict[int, tuple[tuple[int, ...], ...]]:
    """Of each MoE layer: which experts of its side's next one follow each of its experts."""
    return {
        number: likely_next(side.traces, place) for side in sides for place, number in enumerate(side.layers)
    }
