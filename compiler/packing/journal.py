"""What has been written and is safe on disk, so that a killed pack goes on where it was.

One JSON object a line: first the identity of the work, then one line each time more of a file was synced. A
line cut short by a kill is ignored, and so is the whole journal if it belongs to other work.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

JOURNAL_FILE = "pack-journal.jsonl"


@dataclass(frozen=True)
class Saved:
    """The beginning of a file that is on disk."""

    file: str
    items: int
    """Finished experts or groups of dense tensors."""
    size_bytes: int
    sha256: str
    """Of these bytes."""
    nonfinite: dict[str, int]
    """Tensor -> values in it that are NaN or infinite."""


class Journal:
    """The journal of one output folder; safe to use from several threads."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.saved: dict[str, Saved] = {}
        lines = path.read_text().split("\n") if path.is_file() else []
        self.resumed = bool(lines) and lines[0] == _identity_line(identity)
        if self.resumed:
            self.saved = {saved.file: saved for saved in map(_parse, lines[1:]) if saved is not None}
        with path.open("w") as file:  # without a line that was cut short
            file.write(_identity_line(identity) + "\n")
            file.writelines(json.dumps(asdict(saved)) + "\n" for saved in self.saved.values())
            file.flush()
            os.fsync(file.fileno())

    def add(self, saved: Saved) -> None:
        """Record that the beginning of a file is on disk; the file itself must be synced before."""
        with self._lock, self._path.open("a") as file:
            file.write(json.dumps(asdict(saved)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _identity_line(identity: str) -> str:
    return json.dumps({"moec-pack": 1, "identity": identity})


def _parse(line: str) -> Saved | None:
    try:
        return Saved(**json.loads(line))
    except (ValueError, TypeError):
        return None
