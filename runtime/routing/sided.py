"""Routing of a model with an encoder: the tokens of sources meet its MoE layers, a decoder's tokens the others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from moec.artifacts.layout.footprint import encoder_experts
from moec.runtime.engine.scheduler import Chunk, StepPlan
from moec.runtime.engine.sequence import Request, Sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    from numpy.typing import NDArray

    from moec.artifacts.model import ExpertsLayer, ModelRecord
    from moec.artifacts.traces import Traces

    Make = Callable[[tuple[ExpertsLayer, ...], Traces | None], "StepRecorder"]
    """A recorder of some layers, and of what was recorded of them before."""


class StepRecorder(Protocol):
    """Records what tokens choose, step by step."""

    def record(self, layer: int, index: NDArray[np.int64], weight: NDArray[np.float32]) -> None:
        """See `moec.runtime.routing.recorder.RoutingRecorder`."""
        ...

    def see(self, layer: int, hidden: NDArray[np.float32]) -> None:
        """See `moec.runtime.routing.recorder.RoutingRecorder`."""
        ...

    def end_step(self, plan: StepPlan) -> None:
        """Say which tokens the choices recorded since the last call belong to."""
        ...

    def traces(self) -> Traces:
        """Everything that is kept."""
        ...


def recorder_for(model: ModelRecord, make: Make, earlier: Traces | None = None) -> StepRecorder:
    """A recorder of all MoE layers of a model, with or without an encoder that has some."""
    return SidedRecorder(model, make, earlier) if encoder_experts(model) else make(model.experts, earlier)


def layers_of_sides(model: ModelRecord) -> tuple[tuple[ExpertsLayer, ...], tuple[ExpertsLayer, ...]]:
    """The encoder's MoE layers, and the decoder's."""
    own = encoder_experts(model)
    return (
        tuple(layer for layer in model.experts if layer.layer in own),
        tuple(layer for layer in model.experts if layer.layer not in own),
    )


class SidedRecorder:
    """Two recorders, one for each side; of a source the recorder makes a prompt of as many tokens.

    Args:
        model: with an encoder.
        make: a recorder for one side's MoE layers.
        earlier: what was recorded before.
    """

    def __init__(self, model: ModelRecord, make: Make, earlier: Traces | None = None) -> None:
        own, others = layers_of_sides(model)
        self._encoder = make(own, None if earlier is None else earlier.encoder)
        self._decoder = make(others, earlier)
        self._places: dict[int, tuple[StepRecorder, int]] = {
            layer.layer: (recorder, place)
            for recorder, side in ((self._encoder, own), (self._decoder, others))
            for place, layer in enumerate(side)
        }

    def record(self, layer: int, index: NDArray[np.int64], weight: NDArray[np.float32]) -> None:
        """Keep a copy of one layer's choices ``[T, K]`` and their weights ``[T, K]``."""
        recorder, place = self._places[layer]
        recorder.record(place, index, weight)

    def see(self, layer: int, hidden: NDArray[np.float32]) -> None:
        """The hidden states ``[T, H]`` that the layer was given."""
        recorder, place = self._places[layer]
        recorder.see(place, hidden)

    def end_step(self, plan: StepPlan) -> None:
        """Say which tokens of the decoder the choices belong to."""
        self._decoder.end_step(plan)

    def end_sources(self, sequences: Iterable[Sequence]) -> None:
        """Say whose sources, one after the other, the encoder has read since the last call."""
        read = [Sequence(each.id, Request(each.request.source, 0)) for each in sequences]
        chunks = (Chunk(each, 0, 0, len(each.request.prompt)) for each in read)
        self._encoder.end_step(StepPlan(tuple(chunks), ()))

    def traces(self) -> Traces:
        """Of the decoder, with the encoder's in them."""
        return replace(self._decoder.traces(), encoder=self._encoder.traces())
