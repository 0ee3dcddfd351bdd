"""What all tests share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    """No test finds what a run before it, or the user's own, has noted; processes that tests start do not either."""
    before = os.environ.get("MOEC_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOEC_CACHE"] = folder
        yield
    if before is None:
        del os.environ["MOEC_CACHE"]
    else:
        os.environ["MOEC_CACHE"] = before


LONGEST = "test_emulated_gpu.py"
"""Takes minutes in one process: begun last, it would keep one processor busy while the others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test."""
    items.sort(key=lambda item: LONGEST not in item.nodeid)
