"""Whether the files of a bundle are those that its manifest lists: sizes, and SHA-256 by several threads."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from moec.artifacts.files.manifest import MANIFEST_NAME, FileRecord
from moec.artifacts.paths import list_files
from moec.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    from moec.artifacts.files.manifest import Manifest

Level: TypeAlias = Literal["full", "once", "sizes"]
"""``full`` hashes every file; ``once`` all but the weight files that were hashed before and have not changed since (see
`moec.artifacts.files.stamps`); ``sizes`` the JSON files alone. Sizes are always compared."""

LEVELS: tuple[Level, ...] = get_args(Level)

_CHUNK_BYTES = 1 << 22


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, hexadecimal; ``progress`` is told the bytes of each piece read."""
    digest = hashlib.sha256()
    buffer = bytearray(min(_CHUNK_BYTES, max(1, path.stat().st_size)))
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if progress:
                progress(count)
    return digest.hexdigest()


def hash_files(
    folder: Path, paths: Iterable[str], progress: Callable[[int], None] | None = None
) -> dict[str, FileRecord]:
    """Sizes and hashes of files below ``folder``; ``progress`` is called from several threads."""

    def record(path: str) -> FileRecord:
        return FileRecord((folder / path).stat().st_size, sha256_file(folder / path, progress))

    ordered = list(paths)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(ordered, pool.map(record, ordered), strict=True))


def check(
    folder: Path,
    manifest: Manifest,
    level: Level = "full",
    progress: Callable[[int], None] | None = None,
    unread: Collection[str] = (),
) -> None:
    """Compare the files below ``folder`` with the manifest's table.

    Args:
        folder: the bundle.
        manifest: its manifest, already read.
        level: how much to read.
        progress: told the bytes of each piece read, from several threads.
        unread: files that are not read at any level.

    Raises:
        BundleError: a file is missing, added, of another size, or (where read) of another SHA-256.
    """
    try:
        found = list_files(folder)
        found.pop(MANIFEST_NAME, None)
        _compare_tables(folder, found, manifest.files)
        to_read = [path for path in manifest.files if level != "sizes" or _is_record(path)]
        to_read = [path for path in to_read if path not in unread]
    except OSError as error:
        raise _unreadable(folder, error) from error
    check_hashes(folder, manifest, to_read, progress)


def check_hashes(
    folder: Path,
    manifest: Manifest,
    paths: Iterable[str],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Hash files of a bundle.

    Args:
        folder: the bundle.
        manifest: says what they should hash to.
        paths: relative to ``folder``.
        progress: told the bytes of each piece read, from several threads.

    Raises:
        BundleError: one of them is of another SHA-256, or cannot be read.
    """
    try:
        hashed = hash_files(folder, paths, progress)
    except OSError as error:
        raise _unreadable(folder, error) from error
    for path, record in hashed.items():
        if record.sha256 != manifest.files[path].sha256:
            raise damaged(folder, f"The file {path} was changed: its SHA-256 is {record.sha256}.")


def _unreadable(folder: Path, error: OSError) -> BundleError:
    return BundleError(f"{folder} cannot be read.", str(error), "Check the disk and the permissions.")


def damaged(folder: Path, why: str) -> BundleError:
    """The error for a bundle that is not what its manifest says; ``why`` is a sentence."""
    return BundleError(f"The bundle {folder} is damaged.", why, "Copy it again, or compile the model again.")


def _is_record(path: str) -> bool:
    return path.endswith(".json") and ("/" not in path or path.startswith("modules/"))


def _compare_tables(folder: Path, found: Mapping[str, int], listed: Mapping[str, FileRecord]) -> None:
    missing = sorted(set(listed) - set(found))
    added = sorted(set(found) - set(listed))
    if missing:
        raise damaged(folder, f"{_some(missing)} missing.")
    if added:
        raise damaged(folder, f"{_some(added)} there, but not in {MANIFEST_NAME}.")
    for path, record in listed.items():
        if found[path] != record.size_bytes:
            raise damaged(folder, f"The file {path} has {found[path]} bytes instead of {record.size_bytes}.")


def _some(paths: list[str]) -> str:
    if len(paths) == 1:
        return f"The file {paths[0]} is"
    return f"{len(paths)} files ({', '.join(paths[:3])}{', …' if len(paths) > 3 else ''}) are"
