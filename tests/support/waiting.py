"""Waiting for other threads and processes: as long as the slowest machine may need, but not for what hangs."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG_SECONDS = 120.0
"""What takes longer does not come any more."""
HANG_NS = int(HANG_SECONDS * 10**9)


def wait_until(holds: Callable[[], bool]) -> None:
    """Return once it does; an assertion fails where that takes longer than `HANG_SECONDS`."""
    deadline = time.monotonic() + HANG_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "what is waited for does not come"
        time.sleep(0.002)
