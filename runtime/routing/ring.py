"""The routing of what a model generates, kept in a ring of bounded size and written to a file of traces."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.files.traces import load_traces, save_traces
from moec.artifacts.traces import LayerTrace, Traces, index_dtype, last_tokens, quantize_weights
from moec.errors import BundleError, OutputError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from moec.artifacts.model import ExpertsLayer
    from moec.runtime.engine.scheduler import StepPlan

    _Choices = tuple[NDArray[Any], NDArray[np.uint8]]
    """Experts and their weights, both ``[T, K]``."""

DEFAULT_CAPACITY = 1 << 14
"""Tokens. Of DeepSeek-V2-Lite they take 5 MB."""


class RoutingRing:
    """Which experts the last tokens chose. See `moec.runtime.routing.recorder.RoutingRecorder` for how it is told.

    Args:
        layers: the MoE layers.
        capacity: tokens that are kept; the oldest go first.
        earlier: what was recorded before, of the same model.
    """

    def __init__(
        self, layers: tuple[ExpertsLayer, ...], capacity: int, earlier: Traces | None = None
    ) -> None:
        self._layers, self._capacity = layers, capacity
        shapes = [((capacity, layer.top_k), layer.experts) for layer in layers]
        self._chosen: list[NDArray[Any]] = [np.zeros(shape, index_dtype(E)) for shape, E in shapes]
        self._weights = [np.zeros(shape, np.uint8) for shape, _ in shapes]
        self._sequence = np.full(capacity, -1, np.int64)
        self._position = np.zeros(capacity, np.int64)
        self._prefill = np.zeros(capacity, np.bool_)
        self._next = 0
        self._step: dict[int, _Choices] = {}
        """What each layer chose in the step at work; it takes older tokens' places when that is over, if it counts."""
        self._earlier = 0
        """Sequences of earlier runs: those of this one are numbered behind them."""
        if earlier is not None:
            self._restore(last_tokens(earlier, capacity))

    def record(self, layer: int, index: NDArray[np.int64], weight: NDArray[np.float32]) -> None:
        """Keep one layer's choices ``[T, K]`` and their weights ``[T, K]`` of the step at work."""
        self._step[layer] = index.astype(self._chosen[layer].dtype), quantize_weights(weight)

    def see(self, layer: int, hidden: NDArray[np.float32]) -> None:
        """Nothing is kept of it."""

    def end_step(self, plan: StepPlan) -> None:
        """Say which tokens the choices belong to that were recorded since the last call; of no chunks, none counts."""
        step, self._step = self._step, {}
        if not plan.chunks or not step:
            return
        for layer, (index, weight) in step.items():
            rows = (self._next + np.arange(len(index))) % self._capacity
            self._chosen[layer][rows], self._weights[layer][rows] = index, weight
        for chunk in plan.chunks:
            positions = chunk.start + np.arange(chunk.count)
            self._note(
                self._earlier + chunk.sequence.id, positions, positions < len(chunk.sequence.request.prompt)
            )

    def traces(self) -> Traces:
        """What is kept, sequences in the order of their arrival; a token that was recomputed counts once."""
        # The latest of equal tokens is the last in the order of writing.
        written = (self._next + np.arange(self._capacity)) % self._capacity
        rows = written[self._sequence[written] >= 0]
        rows = rows[np.lexsort((self._position[rows], self._sequence[rows]))]
        sequence, position = self._sequence[rows], self._position[rows]
        last = np.ones(len(rows), np.bool_)
        last[:-1] = (np.diff(sequence) != 0) | (np.diff(position) != 0)
        rows, sequence = rows[last], sequence[last]
        first = np.ones(len(rows), np.bool_)
        first[1:] = np.diff(sequence) != 0
        layers = tuple(
            LayerTrace(layer.experts, chosen[rows], weights[rows])
            for layer, chosen, weights in zip(self._layers, self._chosen, self._weights, strict=True)
        )
        return Traces(layers, np.flatnonzero(first).astype(np.int64), self._prefill[rows])

    def _note(self, sequence: int, positions: NDArray[np.int64], prefill: NDArray[np.bool_]) -> None:
        rows = (self._next + np.arange(len(positions))) % self._capacity
        self._sequence[rows], self._position[rows], self._prefill[rows] = sequence, positions, prefill
        self._next = (self._next + len(positions)) % self._capacity

    def _restore(self, earlier: Traces) -> None:
        ends = [*earlier.sequence_starts[1:].tolist(), earlier.tokens]
        rows = np.arange(earlier.tokens)
        for number, (start, end) in enumerate(zip(earlier.sequence_starts.tolist(), ends, strict=True)):
            self._note(number, rows[: end - start], earlier.prefill[start:end])
        self._earlier = len(ends) if earlier.tokens else 0
        for layer, chosen, weights in zip(earlier.layers, self._chosen, self._weights, strict=True):
            chosen[rows] = layer.chosen
            if layer.weights is not None:
                weights[rows] = layer.weights


def read_earlier(
    path: Path, layers: tuple[ExpertsLayer, ...], of_encoder: tuple[ExpertsLayer, ...] = ()
) -> Traces | None:
    """What an earlier run left at ``path``; ``None`` where there is nothing.

    Args:
        path: of a file of traces.
        layers: the MoE layers, or the decoder's.
        of_encoder: those of an encoder.

    Raises:
        BundleError: it is no file of traces, or of another model.
        OutputError: its folder does not exist, or cannot be written.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(
            f"trace_path={str(path)!r} is in no folder.", f"{path.parent} is not there.", "Make it first."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(
            f"trace_path={str(path)!r} cannot be written.",
            f"No permission to write in {folder}.",
            "Choose another place.",
        )
    try:
        path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(
            f"trace_path={str(path)!r} cannot be written.", f"{error.strerror}.", "Choose another place."
        ) from error
    traces = load_traces(path)
    sources = () if traces.encoder is None else traces.encoder.layers
    found = [(layer.experts, layer.chosen.shape[1]) for layer in (*sources, *traces.layers)]
    expected = [(layer.experts, layer.top_k) for layer in (*of_encoder, *layers)]
    if found != expected or len(sources) != len(of_encoder):
        raise BundleError(
            f"{path} has routing traces of another model.",
            "Its MoE layers differ from this model's.",
            "Give another trace_path.",
        )
    return traces


def write_traces(traces: Traces, path: Path) -> None:
    """Write a file of traces that is whole at every moment.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        save_traces(traces, partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"The routing traces could not be written to {path}.",
            f"{error.strerror}.",
            "Free space, or choose another place.",
        ) from error
