"""What an installed moec needs besides Python files is in the wheel."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CODE = {".py", ".pyc"}


@pytest.mark.parametrize("room", ["artifacts", "compiler", "formats", "planning", "runtime", "schemas"])
def test_every_data_file_of_a_room_is_packaged(room: str) -> None:
    folder = ROOT / "src" / "moec" / room
    patterns = SETTINGS["tool"]["setuptools"]["package-data"].get(f"moec.{room}", [])
    packaged = {path for pattern in patterns for path in folder.glob(pattern)}
    data = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in CODE}
    hidden = {path for path in data if any(part.startswith(".") for part in path.relative_to(folder).parts)}
    # rglob does not enter links to folders, which machine_files is; glob does.
    assert data - hidden <= packaged
    assert all(any(folder.glob(pattern)) for pattern in patterns), "a pattern finds nothing"
