"""What of a bundle was read and found right before, so that a load need not hash 31 GB again.

One small file a bundle in the user's cache folder, not in the bundle: a bundle cannot vouch for itself. A stamp is good
for files whose size, inode and times of last change are what they were when their bytes were hashed. It says nothing of
bytes that a disk loses by itself, and trusts the user's own cache folder; ``verify="full"`` reads everything again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from moec import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FileState: TypeAlias = tuple[int, int, int, int, int]
"""Size, device, inode, and in nanoseconds the times of the last change of contents and of anything."""

SETTLED_NS = 2_000_000_000
"""A file is stamped this long after its last change at the earliest: until then one more change may not show, because
file systems count time in steps."""


@dataclass(frozen=True)
class Stamp:
    """What is known of a bundle."""

    records_checked: bool = False
    """Whether its JSON files, of which the manifest has the hashes, were held against their schemas by this moec."""
    files: Mapping[str, FileState] = field(default_factory=dict)
    """Those whose bytes had the manifest's hash, and their states then."""

    def unchanged(self, states: Mapping[str, FileState]) -> frozenset[str]:
        """Which files are known and still what they were."""
        return frozenset(name for name, state in states.items() if self.files.get(name) == state)


def file_states(folder: Path, names: Iterable[str]) -> dict[str, FileState]:
    """The present state of files; those that are not there are left out."""
    states: dict[str, FileState] = {}
    for name in names:
        with contextlib.suppress(OSError):
            found = (folder / name).stat()
            states[name] = (found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
    return states


def read_stamp(folder: Path, manifest_sha256: str) -> Stamp:
    """What is known of the bundle in ``folder`` with this manifest; nothing, where there is no stamp."""
    try:
        value = json.loads(_path(folder, manifest_sha256).read_bytes())
        if value["moec"] == __version__:
            return Stamp(True, {name: tuple(state) for name, state in value["files"].items()})
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return Stamp()


def write_stamp(
    folder: Path, manifest_sha256: str, before: Mapping[str, FileState], hashed: Iterable[str]
) -> None:
    """Note that a bundle's JSON files were checked and some files hashed; failing to note it is no error.

    Args:
        folder: the bundle.
        manifest_sha256: of its manifest.
        before: states of its files before they were read.
        hashed: those that were found right, now or before.
    """
    after, now = file_states(folder, hashed), time.time_ns()
    good = {
        name: state
        for name, state in after.items()
        if before.get(name) == state and now - max(state[3], state[4]) >= SETTLED_NS
    }
    with contextlib.suppress(OSError, RuntimeError):
        _write(_path(folder, manifest_sha256), {"moec": __version__, "bundle": str(folder), "files": good})


def _path(folder: Path, manifest_sha256: str) -> Path:
    """Raises `RuntimeError` where the user has no home."""
    own, cache = os.environ.get("MOEC_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        base = Path(own)
    else:
        base = (
            Path(cache) if cache and Path(cache).is_absolute() else Path("~/.cache").expanduser()
        ) / "moec"
    name = hashlib.sha256(f"{manifest_sha256}\n{folder.resolve()}".encode()).hexdigest()
    return base / "verified" / f"{name}.json"


def _write(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
