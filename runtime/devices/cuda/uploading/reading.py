"""What a thread does that reads weight files: fill pieces of memory, hash them, hand them on."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, NamedTuple

from moec.artifacts.files.verify import damaged

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from moec.errors import BundleError


class Part(NamedTuple):
    """Bytes ``start .. end - 1`` of a file; all of it where it is hashed."""

    name: str
    address: int
    """Where the file's first byte goes."""
    start: int
    end: int
    sha256: str | None


class Stopped(Exception):  # noqa: N818 - it is no error
    """The upload was abandoned, or another thread has failed."""


class Reader:
    """What every reading thread does; nothing in it belongs to one of them.

    Args:
        folder: the bundle.
        take: the next part, or ``None``.
        free: waits for a piece of memory, its number and bytes; raises `Stopped` where none will come.
        put: hands on a piece: its number, the address of what is in it, bytes.
        progress: told the bytes of each piece.
    """

    def __init__(
        self,
        folder: Path,
        take: Callable[[], Part | None],
        free: Callable[[], tuple[int, memoryview]],
        put: Callable[[int, int, int], None],
        progress: Callable[[int], None] | None,
    ) -> None:
        self._folder, self._take, self._free, self._put, self._progress = folder, take, free, put, progress

    def run(self) -> None:
        """Read until no part is left.

        Raises:
            Stopped: see ``free``.
            BundleError: a file is damaged.
        """
        while (part := self._take()) is not None:
            try:
                file = os.open(self._folder / part.name, os.O_RDONLY)
            except OSError as error:
                raise self._unreadable(part, error) from error
            try:
                self._read(part, file)
            finally:
                os.close(file)

    def _read(self, part: Part, file: int) -> None:
        digest = hashlib.sha256() if part.sha256 else None
        place = part.start
        while place < part.end:
            piece, memory = self._free()
            view = memory[: part.end - place]
            self._fill(view, part, file, place)
            if digest:
                digest.update(view)
            self._put(piece, part.address + place, view.nbytes)
            if self._progress:
                self._progress(view.nbytes)
            place += view.nbytes
        if digest and digest.hexdigest() != part.sha256:
            raise damaged(
                self._folder, f"The file {part.name} was changed: its SHA-256 is {digest.hexdigest()}."
            )

    def _fill(self, view: memoryview, part: Part, file: int, place: int) -> None:
        """Read the bytes from ``place`` on into all of ``view``."""
        done = 0
        while done < view.nbytes:
            try:
                count = os.preadv(file, [view[done:]], place + done)
            except OSError as error:
                raise self._unreadable(part, error) from error
            if count == 0:
                raise damaged(self._folder, f"The file {part.name} ends after {place + done} bytes.")
            done += count

    def _unreadable(self, part: Part, error: OSError) -> BundleError:
        return damaged(self._folder, f"The file {part.name} cannot be read: {error.strerror}.")
