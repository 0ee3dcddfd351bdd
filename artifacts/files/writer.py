"""Write a bundle: into a folder beside the output, which takes the output's name only when it is complete."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from moec.artifacts.files.manifest import MANIFEST_NAME, render_manifest
from moec.artifacts.files.verify import hash_files
from moec.artifacts.paths import WEIGHTS_FOLDER, is_safe, list_files
from moec.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from moec.artifacts.files.manifest import FileRecord, Manifest

_KEY_FILE = "key"


class BundleWriter:
    """Context manager around the staging folder ``<output>.partial``, which holds ``bundle/`` and ``state/``.

    Put files below ``folder``, then call ``commit``. Left without ``commit``, it removes the folder, except
    that with a ``resume_key`` a Ctrl-C keeps it once there are weights: the next writer with the same output and key
    finds ``weights/`` and ``state`` as they were.

    Args:
        output: the bundle to make.
        force: replace a bundle that is there already.
        resume_key: what the weights are made from (the model's fingerprint and whatever else changes their
            bytes); a staging folder left with another key is discarded. ``None``: never resume, never keep.

    Raises:
        OutputError: the output exists (and is not a bundle, or without ``force``), cannot be written, or
            another process is writing it.
    """

    def __init__(self, output: Path, *, force: bool = False, resume_key: str | None = None) -> None:
        self.output = Path(output).absolute()
        self._staging = self.output.with_name(self.output.name + ".partial")
        self.folder = self._staging / "bundle"
        """Where the bundle's files go."""
        self.state = self._staging / "state"
        """For the progress of a resumable run; never part of the bundle."""
        self.resumed = False
        """Whether ``folder`` holds an earlier run's work."""
        self._aside = self.output.with_name(self.output.name + ".replaced")
        self._force, self._resume_key = force, resume_key
        self._lock = -1
        self._made_parents: list[Path] = []

    def __enter__(self) -> BundleWriter:
        try:
            self._make_parents()
            self._restore_replaced()
            check_output(self.output, force=self._force)
            self._open_staging()
        except OSError as error:
            self._release()
            raise output_error(self.output, error) from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        interrupted = self._resume_key is not None and isinstance(error, KeyboardInterrupt)
        try:
            if self._lock >= 0 and not (interrupted and (self.folder / WEIGHTS_FOLDER).is_dir()):
                shutil.rmtree(self._staging, ignore_errors=True)
        finally:
            self._release()
        if isinstance(error, OSError) and error.errno in _OUTPUT_ERRORS:
            raise output_error(self.output, error) from error

    def commit(self, manifest: Manifest, known: Mapping[str, FileRecord] | None = None) -> Manifest:
        """Fill in the file table, write the manifest, flush everything to disk, and take the output's name.

        Args:
            manifest: everything but ``files`` and ``manifest_sha256``, which are replaced.
            known: sizes and hashes of files that were computed while writing them, so that they need not be
                read.

        Returns:
            The manifest as written.

        Raises:
            OutputError: the disk is full, or the output appeared meanwhile.
        """
        try:
            manifest = self.preview(manifest, known)
            _flush(self.folder)
            check_output(self.output, force=self._force)
            self._take_name()
        except OSError as error:
            raise output_error(self.output, error) from error
        return manifest

    def preview(self, manifest: Manifest, known: Mapping[str, FileRecord] | None = None) -> Manifest:
        """Write a manifest for the files as they are now, so that ``folder`` can be opened before ``commit``.

        Arguments and result are those of ``commit``.
        """
        manifest = dataclasses.replace(manifest, files=self._file_table(known or {}))
        (self.folder / MANIFEST_NAME).write_bytes(render_manifest(manifest))
        return manifest

    def _file_table(self, known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
        found = list_files(self.folder)
        found.pop(MANIFEST_NAME, None)
        assert all(is_safe(path) for path in found), f"a file name in {self.folder} cannot be in a manifest"
        assert all(found.get(path) == record.size_bytes for path, record in known.items()), (
            "a known size is wrong"
        )
        hashed = hash_files(self.folder, sorted(set(found) - set(known)))
        return {path: known.get(path) or hashed[path] for path in sorted(found)}

    def _take_name(self) -> None:
        replaced = self.output.exists()
        if replaced:
            shutil.rmtree(self._aside, ignore_errors=True)
            self.output.rename(self._aside)
        try:
            self.folder.rename(self.output)
        except BaseException:
            if replaced:
                self._aside.rename(self.output)
            raise
        _flush_folder(self.output.parent)
        if replaced:
            shutil.rmtree(self._aside, ignore_errors=True)

    def _make_parents(self) -> None:
        self._made_parents = [folder for folder in self.output.parents if not folder.exists()]
        self.output.parent.mkdir(parents=True, exist_ok=True)

    def _restore_replaced(self) -> None:
        # A process killed between the two renames of _take_name left the old bundle aside.
        if self._aside.exists() and not self.output.exists():
            self._aside.rename(self.output)

    def _open_staging(self) -> None:
        self._staging.mkdir(exist_ok=True)
        self._lock = os.open(self._staging, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            self._lock = -1
            raise OutputError(
                f"{self.output} is being written by another process.",
                f"It holds {self._staging}.",
                "Wait for it, or choose another output.",
            ) from error
        key = self.state / _KEY_FILE
        self.resumed = self._resume_key is not None and key.is_file() and key.read_text() == self._resume_key
        if self.resumed:
            self._keep_weights_only()
            return
        for folder in (self.folder, self.state):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir()
        if self._resume_key is not None:
            key.write_text(self._resume_key)

    def _keep_weights_only(self) -> None:
        # Only weights are worth keeping: the rest is made again, perhaps for other targets or from other prompts.
        for entry in self.folder.iterdir():
            if entry.name == WEIGHTS_FOLDER:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        # Folders made for an output that did not come to be; one that holds something stays.
        with contextlib.suppress(OSError):
            for folder in self._made_parents:
                folder.rmdir()


def check_output(output: Path, *, force: bool) -> None:
    """Raise ``OutputError`` where a bundle cannot go to ``output``; call it before long work."""
    _check_place(output)
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise OutputError(f"{output} exists.", "It would be overwritten.", "Give --force, or another output.")
    empty = output.is_dir() and not any(output.iterdir())
    if output.is_symlink() or not (empty or (output / MANIFEST_NAME).is_file()):
        raise OutputError(
            f"{output} exists and is not a bundle.",
            "--force only replaces bundles.",
            "Choose another output.",
        )
    if not os.access(output, os.W_OK | os.X_OK):
        raise output_error(output, PermissionError(errno.EACCES, "It is read-only"))


def _check_place(output: Path) -> None:
    place = next((folder for folder in output.absolute().parents if os.path.lexists(folder)), output)
    if not place.is_dir():
        raise output_error(output, NotADirectoryError(errno.ENOTDIR, f"{place} is not a folder"))
    if not os.access(place, os.W_OK | os.X_OK):
        raise output_error(output, PermissionError(errno.EACCES, f"No permission to write in {place}"))


def output_error(output: Path, error: OSError) -> OutputError:
    """What a failed write means for the person at the terminal."""
    why = error.strerror or str(error)
    do = "Make room, or choose another output." if error.errno in _FULL else "Choose another output."
    return OutputError(f"{output} cannot be written.", f"{why}.", do)


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OUTPUT_ERRORS = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def _flush(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with Path(root, name).open("rb") as file:
                os.fsync(file.fileno())
        _flush_folder(Path(root))


def _flush_folder(folder: Path) -> None:
    # Some file systems cannot flush a folder; the files themselves are safe by then.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
