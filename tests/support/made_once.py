"""What is made once in a run of tests, for all of xdist's workers and for the processes that tests start."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = "MOEC_TESTS_SHARED"
"""The environment variable that names where; tests/conftest.py sets it."""


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name``; where no process has made it yet, ``make`` fills an empty one. It is only to be read."""
    folder = Path(os.environ[FOLDER], name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder.parent))
            make(making)
            making.rename(folder)
    return folder
