"""Recording which experts each token chooses, as `artifacts.traces` keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from moec.artifacts.traces import LayerTrace, Traces, layer_trace
from moec.runtime.routing.early_router import likeliest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from moec.artifacts.ids import ValueId
    from moec.runtime.engine.scheduler import StepPlan
    from moec.runtime.routing.early_router import Routers

    Choices = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]
    """Experts ``[T, K]``, their weights ``[T, K]``, and those that the router named one MoE layer earlier."""

Routing: TypeAlias = tuple[int, "NDArray[np.int64]", "NDArray[np.float32]"]
"""A MoE layer's ordinal, the choices of a step's tokens ``[T, K]`` and their weights ``[T, K]``."""

NOT_ASKED = -1
"""In place of an expert that a router named early."""


class RoutingRecorder(Protocol):
    """Is told what each layer chooses, as the layers run."""

    def record(self, layer: int, index: NDArray[np.int64], weight: NDArray[np.float32]) -> None:
        """Keep a copy of one layer's choices ``[T, K]`` and their weights ``[T, K]``."""
        ...

    def see(self, layer: int, hidden: NDArray[np.float32]) -> None:
        """The hidden states ``[T, H]`` that the layer was given; only where the CPU runs it."""
        ...


class RoutingLog(Protocol):
    """Where a decoding step of a device leaves the choices of all its layers, for the host to read behind it."""

    @property
    def tokens(self) -> int:
        """The most of a step that it has room for."""
        ...

    def places(self, count: int) -> Mapping[ValueId, int]:
        """The address for each value of the chain that a layer chooses experts by, in a step of ``count`` tokens."""
        ...

    def read(self, count: int) -> Callable[[], list[Routing]]:
        """Begin to read what the step that was put into the queue last chooses.

        Returns:
            What waits for it. It must be called before the step after the next one is read.
        """
        ...


class SequenceRecorder:
    """Collects the choices of every MoE layer, step by step, and sorts them by sequence.

    Args:
        experts: number of experts of each MoE layer.
        routers: to note what each layer's router says of the hidden state one MoE layer earlier.
    """

    def __init__(self, experts: tuple[int, ...], routers: Routers = ()) -> None:
        self._experts, self._routers = experts, routers
        self._early: NDArray[np.float32] | None = None
        self._step: list[list[Choices]] = [[] for _ in experts]
        self._sequences: dict[int, list[tuple[int, int, list[Choices]]]] = {}
        """By sequence: first position, number of tokens, and choices of each layer."""
        self._prompts: dict[int, int] = {}

    def record(self, layer: int, index: NDArray[np.int64], weight: NDArray[np.float32]) -> None:
        """Keep a copy of one layer's choices ``[T, K]`` and their weights ``[T, K]``."""
        early = np.full_like(index, NOT_ASKED)
        if self._early is not None and len(self._early) == len(index):
            early = likeliest(self._early, index.shape[1])
        self._early = None
        self._step[layer].append((index.copy(), weight.copy(), early))

    def see(self, layer: int, hidden: NDArray[np.float32]) -> None:
        """Ask the next layer's router."""
        router = self._routers[layer + 1] if layer + 1 < len(self._routers) else None
        self._early = None if router is None else hidden @ router.T

    def end_step(self, plan: StepPlan) -> None:
        """Say which tokens the choices recorded since the last call belong to; none: the step began before."""
        if not all(self._step):
            return
        layers = [tuple(map(np.concatenate, zip(*parts, strict=True))) for parts in self._step]
        first = 0
        for chunk in plan.chunks:
            rows = slice(first, first + chunk.count)
            first += chunk.count
            own = [(index[rows], weight[rows], early[rows]) for index, weight, early in layers]
            self._sequences.setdefault(chunk.sequence.id, []).append((chunk.start, chunk.count, own))
            self._prompts[chunk.sequence.id] = len(chunk.sequence.request.prompt)
        for parts in self._step:
            parts.clear()

    def traces(self) -> Traces:
        """Everything recorded so far, sequences in the order of their arrival."""
        order = sorted(self._sequences)
        lengths = [max(start + count for start, count, _ in self._sequences[key]) for key in order]
        starts = np.cumsum([0, *lengths])
        prefill = np.zeros(starts[-1], np.bool_)
        for key, start in zip(order, starts.tolist(), strict=False):
            prefill[start : start + self._prompts[key]] = True
        places = dict(zip(order, starts.tolist(), strict=False))
        layers = tuple(self._layer(layer, places, int(starts[-1])) for layer in range(len(self._experts)))
        return Traces(layers, starts[:-1].astype(np.int64), prefill)

    def _layer(self, layer: int, places: dict[int, int], tokens: int) -> LayerTrace:
        """One layer's choices of all tokens; a token that was recomputed counts once."""
        width = next((own[layer][0].shape[1] for pieces in self._sequences.values() for *_, own in pieces), 0)
        chosen, weights = np.zeros((tokens, width), np.int64), np.zeros((tokens, width), np.float32)
        early = np.full((tokens, width), NOT_ASKED)
        for key, pieces in self._sequences.items():
            for start, _, own in pieces:
                index, weight, guessed = own[layer]
                rows = slice(places[key] + start, places[key] + start + len(index))
                chosen[rows], weights[rows], early[rows] = index, weight, guessed
        asked = early.size and (early != NOT_ASKED).all()
        return layer_trace(self._experts[layer], chosen, weights, early if asked else None)
