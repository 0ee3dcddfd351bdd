"""Threads of the CPU that compute experts for a GPU, each in one native call from start to stop."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import threading
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts import mailbox
from moec.errors import DeviceError
from moec.runtime.tensors import aligned_empty, aligned_zeros, tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.artifacts.model import ModelRecord
    from moec.runtime.sharing.mailbox import Mailbox

CHUNKS_PER_THREAD = 4
"""Pieces of a phase for each thread: one that is late, or starts late, leaves its pieces to the others."""
SPINS = 20_000
"""Looks at the mailbox, of some 50 ns each, before a thread sleeps between two steps: about a millisecond, which the
host's work between decoding steps does not take."""
WATCHES = 500
"""Times so many looks within a step, half a second or a second, after which threads look once a millisecond: nobody may
be waiting for the step any more."""
PATIENCE_SECONDS = 10.0
"""That threads may take to start, or to stop."""

_FUTEX_WAKE_PRIVATE = 129
_EVERYBODY = (1 << 31) - 1
_FUTEX = {"x86_64": 202}.get(platform.machine(), 98)
"""Number of the system call."""

_libc = ctypes.CDLL(None)


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


class Team:
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
        self.threads = threads
        self._box = box
        self._state = _State(threads, layers)
        box.restart()
        arguments = (*box.host_tensors(), *self._state.tensors())
        self._threads = [
            threading.Thread(
                target=_serve,
                args=(serve, arguments, box, self._state),
                name=f"moec-expert-{number}",
                daemon=True,
            )
            for number in range(threads)
        ]
        # Before the interpreter ends, and before the memory that they look at goes.
        self._finalizer = weakref.finalize(self, _stop, self._state, self._threads)
        try:
            for thread in self._threads:
                thread.start()
            self._await_threads()
        except BaseException:
            self.close()
            raise

    def _await_threads(self) -> None:
        """Until all have left Python's lock behind: whoever waits for the GPU may hold it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._state.control[mailbox.SERVING] < self.threads:
            self.check()
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"Of {self.threads} CPU threads some did not start.",
                    "The machine is too busy.",
                    "Try again.",
                )
            time.sleep(1e-4)

    def begin(self) -> None:
        """A step that may make requests is about to be launched: wake the threads, and keep them awake."""
        control = self._state.control
        if not control[mailbox.EPOCH] & 1:
            control[mailbox.EPOCH] += 1
        self._state.wake()

    def end(self) -> None:
        """The step is finished: threads may sleep."""
        control = self._state.control
        if control[mailbox.EPOCH] & 1:
            control[mailbox.EPOCH] += 1

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

    def close(self) -> None:
        """Stop the threads; a GPU that still waits for them is let go first."""
        self._box.abort()
        self._finalizer()


class _State:
    """What the threads share: kept by each of them, so that it lives as long as they run."""

    def __init__(self, threads: int, layers: Sequence[SharedLayer]) -> None:
        self.error: BaseException | None = None
        self.control = aligned_zeros((mailbox.CONTROL_WORDS,), np.int64)
        self.control[mailbox.CHUNKS] = CHUNKS_PER_THREAD * threads
        self.control[mailbox.SPINS] = SPINS
        self.control[mailbox.WATCHES] = WATCHES
        self._layers = aligned_zeros((len(layers), mailbox.LAYER_WORDS), np.int64)
        for row, layer in zip(self._layers, layers, strict=True):
            row[mailbox.TABLE], row[mailbox.EXPERTS] = layer.table_address, layer.experts
            row[mailbox.CHOSEN], row[mailbox.BODY] = layer.top_k, layer.body
        room = mailbox.ENTRIES * max(layer.intermediate for layer in layers)
        self._middle = aligned_empty((room,), np.float32)

    def tensors(self) -> tuple[Any, ...]:
        """control, layers and middle, as ``serve_experts`` takes them."""
        return tuple(tensor_of(array) for array in (self.control, self._layers, self._middle))

    def wake(self) -> None:
        """Wake every thread that sleeps."""
        address = self.control.ctypes.data + 8 * mailbox.EPOCH
        _libc.syscall(_FUTEX, ctypes.c_void_p(address), _FUTEX_WAKE_PRIVATE, _EVERYBODY, None, None, 0)


def _serve(serve: Callable[..., Any], arguments: tuple[Any, ...], box: Mailbox, state: _State) -> None:
    try:
        serve(*arguments)
    except BaseException as error:  # noqa: BLE001 - nobody is there to catch it; the next step asks for it
        state.error = error
        box.abort()


def _stop(state: _State, threads: Sequence[threading.Thread]) -> None:
    """In this order: see ``_idle`` in ``compiler/kernels/cpu/serve.py``."""
    state.control[mailbox.STOP] = 1
    state.control[mailbox.EPOCH] += 2
    state.wake()
    for thread in threads:
        with contextlib.suppress(RuntimeError):  # never started
            thread.join(PATIENCE_SECONDS)
