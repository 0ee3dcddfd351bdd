"""Tests on a real GPU. ``MOEC_GPU_BUNDLE`` names a bundle with modules for this GPU and for this CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moec import runtime

GPU = "cuda:0"
Load = Callable[..., runtime.Model]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    named = "MOEC_GPU_BUNDLE" in os.environ
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            if not named:
                item.add_marker(pytest.mark.skip(reason="MOEC_GPU_BUNDLE is not set"))


@pytest.fixture(scope="session")
def bundle() -> Path:
    return Path(os.environ["MOEC_GPU_BUNDLE"])


@pytest.fixture
def load(bundle: Path) -> Load:
    """``runtime.load`` of the bundle on the GPU."""

    def load_it(**options: Any) -> runtime.Model:
        return runtime.load(bundle, **{"device": GPU, "verify": "sizes", **options})

    return load_it
