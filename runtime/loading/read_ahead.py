"""Weight files on their way from the disk into the system's cache while a GPU starts, which takes 0.3 s."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PIECE_BYTES = 32 << 20
"""Of one system call, which leaves Python's lock to others."""
THREADS = 8


class ReadAhead:
    """Has the system read files, the first ones first, until it is told to stop or leaves its ``with`` block.

    ``sendfile`` to ``/dev/null`` copies nothing: it waits for pages that are not in memory and passes over those that
    are. Whatever goes wrong is left to those who read the files afterwards.

    Args:
        folder: of the files.
        names: relative to it.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._pieces = iter(self._cut())
        self._threads = [
            threading.Thread(target=self._read, name="moec-read-ahead", daemon=True) for _ in range(THREADS)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Begin no more pieces; others read now."""
        self._stopped.set()

    def _cut(self) -> list[tuple[str, int]]:
        with contextlib.suppress(OSError):
            sizes = {name: (self._folder / name).stat().st_size for name in self._names}
            return [(name, start) for name, size in sizes.items() for start in range(0, size, PIECE_BYTES)]
        return []

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                while not self._stopped.is_set() and (piece := self._take()) is not None:
                    self._pass_over(nowhere, *piece)
            finally:
                os.close(nowhere)

    def _take(self) -> tuple[str, int] | None:
        with self._lock:
            return next(self._pieces, None)

    def _pass_over(self, nowhere: int, name: str, start: int) -> None:
        file = os.open(self._folder / name, os.O_RDONLY)
        try:
            os.posix_fadvise(file, start, PIECE_BYTES, os.POSIX_FADV_SEQUENTIAL)
            os.sendfile(nowhere, file, start, PIECE_BYTES)
        finally:
            os.close(file)
