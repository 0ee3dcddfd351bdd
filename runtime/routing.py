"""Recording which experts each token chooses, as `artifacts.traces` keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from moec.artifacts.traces import LayerTrace, Traces, layer_trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.runtime.engine.scheduler import StepPlan

    Choices = tuple[NDArray[np.int64], NDArray[np.float32]]
    """Experts ``[T, K]`` and their weights ``[T, K]``."""


class RoutingRecorder(Protocol):
    """Is told what each layer chooses, as the layers run."""

    def record(self, layer: int, index: NDArray[np.int64], weight: NDArray[np.float32]) -> None:
        """Keep a copy of one layer's choices ``[T, K]`` and their weights ``[T, K]``."""
        ...


class SequenceRecorder:
    """Collects the choices of every MoE layer, step by step, and sorts them by sequence.

    Args:
        experts: number of experts of each MoE layer.
    """

    def __init__(self, experts: tuple[int, ...]) -> None:
        self._experts = experts
        self._step: list[list[Choices]] = [[] for _ in experts]
        self._sequences: dict[int, list[tuple[int, list[Choices]]]] = {}
        self._prompts: dict[int, int] = {}

    def record(self, layer: int, index: NDArray[np.int64], weight: NDArray[np.float32]) -> None:
        """Keep a copy of one layer's choices ``[T, K]`` and their weights ``[T, K]``."""
        self._step[layer].append((index.copy(), weight.copy()))

    def end_step(self, plan: StepPlan) -> None:
        """Say which tokens the choices recorded since the last call belong to."""
        layers = [tuple(map(np.concatenate, zip(*parts, strict=True))) for parts in self._step]
        first = 0
        for chunk in plan.chunks:
            rows = slice(first, first + chunk.count)
            first += chunk.count
            own = [(index[rows], weight[rows]) for index, weight in layers]
            self._sequences.setdefault(chunk.sequence.id, []).append((chunk.start, own))
            self._prompts[chunk.sequence.id] = len(chunk.sequence.request.prompt)
        for parts in self._step:
            parts.clear()

    def traces(self) -> Traces:
        """Everything recorded so far, sequences in the order of their arrival."""
        order = sorted(self._sequences)
        lengths = [max(start + len(own[0][0]) for start, own in self._sequences[key]) for key in order]
        starts = np.cumsum([0, *lengths])
        prefill = np.zeros(starts[-1], np.bool_)
        for key, start in zip(order, starts.tolist(), strict=False):
            prefill[start : start + self._prompts[key]] = True
        places = dict(zip(order, starts.tolist(), strict=False))
        layers = tuple(self._layer(layer, places, int(starts[-1])) for layer in range(len(self._experts)))
        return Traces(layers, starts[:-1].astype(np.int64), prefill)

    def _layer(self, layer: int, places: dict[int, int], tokens: int) -> LayerTrace:
        """One layer's choices of all tokens; a token that was recomputed counts once."""
        width = next((own[layer][0].shape[1] for pieces in self._sequences.values() for _, own in pieces), 0)
        chosen, weights = np.zeros((tokens, width), np.int64), np.zeros((tokens, width), np.float32)
        for key, pieces in self._sequences.items():
            for start, own in pieces:
                index, weight = own[layer]
                rows = slice(places[key] + start, places[key] + start + len(index))
                chosen[rows], weights[rows] = index, weight
        return layer_trace(self._experts[layer], chosen, weights)
