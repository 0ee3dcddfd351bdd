"""Who may call a model: one thread at a time, of the process that loaded it."""

from __future__ import annotations

from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING

from moec.errors import RequestError
from moec.runtime.process import OwnProcess

if TYPE_CHECKING:
    from collections.abc import Iterator


class Turns:
    """Made where a model is loaded; threads that `take` one wait for each other."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._process = OwnProcess()

    @property
    def here(self) -> bool:
        """Whether this is the process that loaded it, and not a fork of that."""
        return self._process.here

    def check(self) -> None:
        """Raise `RequestError` in a forked process."""
        if not self.here:
            raise RequestError(
                "The model was loaded in another process.",
                "Its threads, and what it has on a GPU, do not go along when a process is forked.",
                "Start processes by multiprocessing's spawn, and load it in each.",
            )

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn, and have it.

        Raises:
            RequestError: this is a forked process.
        """
        self.check()
        with self._lock:
            yield

    @contextmanager
    def try_take(self) -> Iterator[bool]:
        """Have the turn where nobody else has it, and this is the process that loaded the model; whether it is so."""
        mine = self.here and self._lock.acquire(blocking=False)
        try:
            yield mine
        finally:
            if mine:
                self._lock.release()
