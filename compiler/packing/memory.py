"""A bound on what the threads of pack hold together beyond their read buffers."""

from __future__ import annotations

import threading


class MemoryGate:
    """Lets threads hold up to ``limit_bytes`` together; one that wants more than that holds alone."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held: dict[int, int] = {}
        self._changed = threading.Condition()

    def hold(self, size_bytes: int) -> None:
        """Hold so many bytes in this thread, instead of what it held before; waits until they are free."""
        thread = threading.get_ident()
        with self._changed:
            self._held.pop(thread, None)
            self._changed.notify_all()
            if size_bytes:
                self._changed.wait_for(lambda: self._fits(size_bytes))
                self._held[thread] = size_bytes

    def _fits(self, size_bytes: int) -> bool:
        held = sum(self._held.values())
        return held == 0 or held + size_bytes <= self._limit
