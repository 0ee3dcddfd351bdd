"""Steps and the end of what runs them: none runs while devices are closed, and none after."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from moec.runtime.device import closed_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.runtime.device import Device

PATIENCE_SECONDS = 10.0
"""For the step that another thread runs: a daemon's goes on while the interpreter ends."""


class Gate:
    """Whoever uses devices does it in a ``with`` block; raises `DeviceError` there once they are closed.

    Args:
        devices: what is closed.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = tuple(devices)
        self._closed = False
        self._inside = threading.RLock()

    def __enter__(self) -> None:
        self._inside.acquire()
        if self._closed:
            self._inside.release()
            raise closed_error()

    def __exit__(self, *_: object) -> None:
        self._inside.release()

    def close(self) -> None:
        """Let nobody in any more, and close the devices when the last one has left."""
        self._closed = True
        waited = self._inside.acquire(timeout=PATIENCE_SECONDS)
        try:
            for device in self._devices:
                device.close()
        finally:
            if waited:
                self._inside.release()
