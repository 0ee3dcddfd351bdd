"""Threads of the CPU that watch memory for what a GPU wants, each in one native call from start to stop."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import threading
import time
import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.words import mailbox
from moec.errors import DeviceError
from moec.runtime.tensors import aligned_zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SPINS = 20_000
"""Looks at memory, of some 50 ns each, before a thread sleeps between two steps: about a millisecond, which the
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


class WatchState:
    """What the threads share: kept by each of them, so that it lives as long as they run."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.control = aligned_zeros((mailbox.CONTROL_WORDS,), np.int64)
        self.control[mailbox.SPINS] = SPINS
        self.control[mailbox.WATCHES] = WATCHES

    def wake(self) -> None:
        """Wake every thread that sleeps."""
        address = self.control.ctypes.data + 8 * mailbox.EPOCH
        _libc.syscall(_FUTEX, ctypes.c_void_p(address), _FUTEX_WAKE_PRIVATE, _EVERYBODY, None, None, 0)


class Watchers(ABC):
    """Between steps they sleep, within one they watch. A thread that fails aborts the GPU's waiting.

    Args:
        state: what they share.
        watch: what each is in, until ``control`` tells it to stop; it must leave Python's lock to others.
        abort: lets the GPU wait no longer; it must not know these threads.
        threads: how many, at least 1.
        name: of each, before its number.

    Raises:
        DeviceError: a thread did not start.
    """

    def __init__(
        self,
        state: WatchState,
        watch: Callable[[], object],
        abort: Callable[[], None],
        threads: int,
        name: str,
    ) -> None:
        self.threads = threads
        self._state, self._abort = state, abort
        self._threads = [
            threading.Thread(target=_watch, args=(watch, abort, state), name=f"{name}-{number}", daemon=True)
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

    @abstractmethod
    def check(self) -> None:
        """See that everything was done that finished steps wanted.

        Raises:
            DeviceError: it was not; what the step computed is worth nothing.
        """

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
        """A step that may want something is about to be launched: wake the threads, and keep them awake."""
        control = self._state.control
        if not control[mailbox.EPOCH] & 1:
            control[mailbox.EPOCH] += 1
        self._state.wake()

    def end(self) -> None:
        """The step is finished: threads may sleep."""
        control = self._state.control
        if control[mailbox.EPOCH] & 1:
            control[mailbox.EPOCH] += 1

    def close(self) -> None:
        """Stop the threads; a GPU that still waits for them is let go first. Their memory is not looked at again."""
        if self._finalizer.alive:
            self._abort()
            self._finalizer()


def _watch(watch: Callable[[], object], abort: Callable[[], None], state: WatchState) -> None:
    try:
        watch()
    except BaseException as error:  # noqa: BLE001 - nobody is there to catch it; the next step asks for it
        state.error = error
        abort()


def _stop(state: WatchState, threads: Sequence[threading.Thread]) -> None:
    """In this order: see ``_idle`` in ``compiler/kernels/cpu/watch.py``."""
    state.control[mailbox.STOP] = 1
    state.control[mailbox.EPOCH] += 2
    state.wake()
    for thread in threads:
        with contextlib.suppress(RuntimeError):  # never started
            thread.join(PATIENCE_SECONDS)
