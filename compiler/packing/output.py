"""Files of the bundle, written front to back with their hash, and resumed from the journal."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moec.compiler.packing.journal import Saved
from moec.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from moec.compiler.packing.journal import Journal

SAVE_BYTES = 256 << 20
"""A file is synced and its progress put in the journal about every so many bytes."""

_ZEROS = bytes(1 << 16)


@dataclass(frozen=True)
class PackedFile:
    """A finished file."""

    path: Path
    """Relative to the output folder."""
    size_bytes: int
    sha256: str


class Progress(Protocol):
    """Hears how far packing is; called from one thread at a time."""

    def start(self, total_bytes: int) -> None:
        """Packing begins; so many bytes will be written."""

    def advance(self, size_bytes: int) -> None:
        """So many more bytes were written, or found already there."""

    def close(self) -> None:
        """Packing ended, or failed."""


class Silent:
    """Progress that nobody watches."""

    def start(self, total_bytes: int) -> None:
        """Ignore it."""

    def advance(self, size_bytes: int) -> None:
        """Ignore it."""

    def close(self) -> None:
        """Ignore it."""


class OutputFile:
    """One file being written: ``<name>.part`` until it is finished."""

    def __init__(self, folder: Path, name: str, items: int, journal: Journal, progress: Progress) -> None:
        self.name, self.items = name, items
        self.items_done = self.size_bytes = 0
        self.nonfinite: dict[str, int] = {}
        self._final, self._part = folder / name, folder / f"{name}.part"
        self._journal, self._progress = journal, progress
        self._hash = hashlib.sha256()
        self._saved_bytes = 0
        self._resume(journal.saved.get(name))
        self._file = -1

    @property
    def finished(self) -> bool:
        """Whether every item is on disk."""
        return self.items_done == self.items

    def __enter__(self) -> OutputFile:
        if not self.finished:
            with writing(self._part):
                self._file = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
                os.ftruncate(self._file, self.size_bytes)
                os.lseek(self._file, self.size_bytes, os.SEEK_SET)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)

    def write(self, chunk: memoryview | bytes) -> None:
        """Append ``chunk``.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        rest = memoryview(chunk)
        with writing(self._part):
            while rest:
                rest = rest[os.write(self._file, rest) :]
        self._hash.update(chunk)
        self.size_bytes += len(chunk)
        self._progress.advance(len(chunk))

    def pad_to(self, size_bytes: int) -> None:
        """Append zeros until the file has so many bytes."""
        while self.size_bytes < size_bytes:
            self.write(_ZEROS[: size_bytes - self.size_bytes])

    def item_done(self) -> None:
        """One more item is complete; now and then everything so far is synced and put in the journal."""
        self.items_done += 1
        if self.finished or self.size_bytes - self._saved_bytes >= SAVE_BYTES:
            with writing(self._part):
                os.fsync(self._file)
                self._journal.add(
                    Saved(
                        self.name,
                        self.items_done,
                        self.size_bytes,
                        self._hash.hexdigest(),
                        dict(self.nonfinite),
                    )
                )
            self._saved_bytes = self.size_bytes

    def result(self, root: Path) -> PackedFile:
        """Give the finished file its name."""
        assert self.finished
        with writing(self._final):
            if self._part.exists():
                self._part.replace(self._final)
        return PackedFile(self._final.relative_to(root), self.size_bytes, self._hash.hexdigest())

    def _resume(self, saved: Saved | None) -> None:
        if saved is None or not 0 < saved.items <= self.items:
            return
        path = self._final if saved.items == self.items and self._final.exists() else self._part
        digest = _prefix_hash(path, saved.size_bytes, exact=path == self._final)
        if digest is not None and digest.hexdigest() == saved.sha256:
            self._hash, self.items_done = digest, saved.items
            self.size_bytes = self._saved_bytes = saved.size_bytes
            self.nonfinite = dict(saved.nonfinite)
            self._progress.advance(saved.size_bytes)


def _prefix_hash(path: Path, size_bytes: int, *, exact: bool) -> hashlib._Hash | None:
    """The hash of the file's first bytes; ``None`` if it is missing or its size cannot be right."""
    if (
        not path.is_file()
        or path.stat().st_size < size_bytes
        or (exact and path.stat().st_size != size_bytes)
    ):
        return None
    digest, rest, buffer = hashlib.sha256(), size_bytes, bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while rest:
            count = file.readinto(memoryview(buffer)[: min(rest, len(buffer))])
            digest.update(memoryview(buffer)[:count])
            rest -= count or rest
    return digest


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing ``path`` into an ``OutputError``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            do = "Free some space, then run it again."
            raise OutputError(f"The disk is full: cannot write {path}.", str(error), do) from error
        raise OutputError(
            f"Cannot write {path}.", str(error), "Check the folder's permissions, or write elsewhere."
        ) from error
