"""What the benchmarks start as processes of their own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.support import children
from benchmarks.support.children import run_child
from benchmarks.support.work import Work


@pytest.mark.parametrize("module", [children.ENGINE, children.TRANSFORMERS, children.ACCELERATE])
def test_children_are_there(module: str) -> None:
    assert find_spec(module) is not None


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"engine_run failed: (.|\n)*/nowhere"):
        run_child(children.ENGINE, Path("/nowhere"), [Work(1, 4, 2)], [])
