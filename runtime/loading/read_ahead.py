"""Weight files on their way from the disk into the system's cache while a GPU starts, which takes 0.3 s."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PIECE_BYTES = 32 << 20
"""Of one system call, which leaves Python's lock to others."""
THREADS = 8


class _Piece(NamedTuple):
    name: str
    start: int
    end: int


class ReadAhead:
    """Has the system read files, the first ones first, until it is told to stop or leaves its ``with`` block.

    ``sendfile`` to ``/dev/null`` copies nothing, and waits for pages that are not in memory. A thread that finds a
    piece there already ends: the rest is taken to be there too. Whatever goes wrong is left to those who read the
    files afterwards.

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

    def _cut(self) -> list[_Piece]:
        with contextlib.suppress(OSError):
            sizes = {name: (self._folder / name).stat().st_size for name in self._names}
            return [
                _Piece(name, start, min(start + PIECE_BYTES, size))
                for name, size in sizes.items()
                for start in range(0, size, PIECE_BYTES)
            ]
        return []

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                while not self._stopped.is_set() and (piece := self._take()) is not None:
                    if not self._pass_over(nowhere, piece):
                        return
            finally:
                os.close(nowhere)

    def _take(self) -> _Piece | None:
        with self._lock:
            return next(self._pieces, None)

    def _pass_over(self, nowhere: int, piece: _Piece) -> bool:
        """False: it is in memory already."""
        file = os.open(self._folder / piece.name, os.O_RDONLY)
        try:
            # The end of a piece: what the system reads ahead of another one's end does not reach that far.
            if _in_memory(file, piece.end - 1):
                return False
            os.posix_fadvise(file, piece.start, PIECE_BYTES, os.POSIX_FADV_SEQUENTIAL)
            os.sendfile(nowhere, file, piece.start, PIECE_BYTES)
        finally:
            os.close(file)
        return True


def _in_memory(file: int, place: int) -> bool:
    try:
        os.preadv(file, [bytearray(1)], place, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True
