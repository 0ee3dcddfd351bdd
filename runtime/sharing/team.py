"""Threads of the CPU that compute experts for a GPU, each in one native call from start to stop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.words import mailbox
from moec.errors import DeviceError
from moec.runtime.sharing.watchers import Watchers, WatchState
from moec.runtime.tensors import aligned_empty, aligned_zeros, tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.artifacts.model import ModelRecord
    from moec.runtime.sharing.mailbox import Mailbox

CHUNKS_PER_THREAD = 4
"""Pieces of a phase for each thread: one that is late, or starts late, leaves its pieces to the others."""


@dataclass(frozen=True)
class SharedLayer:
    """One MoE layer as the CPU's threads see it."""

    table_address: int
    """Of int64 ``[E]``: where each expert lies in host memory. Whoever gives it keeps it."""
    experts: int
    top_k: int
    body: int
    """Its body's number in the model."""
    intermediate: int


def shared_layers(model: ModelRecord, tables: Sequence[int]) -> list[SharedLayer]:
    """The MoE layers as a team sees them; ``tables`` are addresses of their tables."""
    bodies = {body.name: (number, body) for number, body in enumerate(model.bodies)}
    return [
        SharedLayer(
            table, layer.experts, layer.top_k, bodies[layer.body][0], bodies[layer.body][1].intermediate
        )
        for layer, table in zip(model.experts, tables, strict=True)
    ]


class Team(Watchers):
    """Threads that answer requests in a mailbox; between steps they sleep, within one they watch it.

    A thread that fails aborts the GPU's waiting; `check` says so.

    Args:
        serve: the CPU target's ``serve_experts``, which must leave Python's lock to others.
        box: where requests come from; its memory must outlive the team.
        layers: of the model, by ordinal.
        threads: how many, at least 1.

    Raises:
        DeviceError: a thread did not start.
    """

    def __init__(
        self, serve: Callable[..., Any], box: Mailbox, layers: Sequence[SharedLayer], threads: int
    ) -> None:
        self._box = box
        state = _State(threads, layers)
        box.restart()
        arguments = (*box.host_tensors(), *state.tensors())
        super().__init__(state, partial(serve, *arguments), box.abort, threads, "moec-expert")

    def check(self) -> None:
        """See that all requests of the steps that are finished were answered.

        Raises:
            DeviceError: the GPU gave up waiting, or a thread failed; what the step computed is worth nothing.
        """
        error = self._state.error
        if error is not None:
            raise DeviceError(
                "A CPU thread that computes experts failed.",
                f"{error}.",
                "Load the model again, or with cpu_threads=0.",
            ) from error
        if self._box.failed_request:
            raise DeviceError(
                "The CPU did not compute its experts in time.",
                f"The GPU gave up request {self._box.failed_request}; the CPU's threads hang, or were stopped.",
                "Load the model again, or with cpu_threads=0.",
            )


class _State(WatchState):
    """What the threads share beside the mailbox."""

    def __init__(self, threads: int, layers: Sequence[SharedLayer]) -> None:
        super().__init__()
        self.control[mailbox.CHUNKS] = CHUNKS_PER_THREAD * threads
        self._layers = aligned_zeros((len(layers), mailbox.LAYER_WORDS), np.int64)
        for row, layer in zip(self._layers, layers, strict=True):
            row[mailbox.TABLE], row[mailbox.EXPERTS] = layer.table_address, layer.experts
            row[mailbox.CHOSEN], row[mailbox.BODY] = layer.top_k, layer.body
        room = mailbox.ENTRIES * max(layer.intermediate for layer in layers)
        self._middle = aligned_empty((room,), np.float32)

    def tensors(self) -> tuple[Any, ...]:
        """control, layers and middle, as ``serve_experts`` takes them."""
        return tuple(tensor_of(array) for array in (self.control, self._layers, self._middle))
