"""What all tests share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

from tests.support import made_once


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test finds what a run before it, or the user's own, has noted; processes that tests start do not either."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("MOEC_CACHE", folder)
        patch.setenv(made_once.FOLDER, os.environ.get(made_once.FOLDER, str(shared)))
        yield


LONGEST = "test_emulated_gpu.py"
"""Takes minutes in one process: begun last, it would keep one processor busy while the others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test."""
    items.sort(key=lambda item: LONGEST not in item.nodeid)
