"""A tiny bundle to read and to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.tiny_bundle import make_bundle


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("pristine") / "tiny.moec")


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "tiny.moec"))
