"""Which tiny models ``make test`` runs where all of them take minutes; ``make test-slow`` runs the others."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import pytest

CANARIES = ("deepseek_v2_lite", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_next")
"""One of each kind of attention and of experts, and of states."""


def most_slow(names: Iterable[Hashable], canaries: Iterable[Hashable] = CANARIES) -> list[Any]:
    """Test parameters, those that are no canaries for ``make test-slow``."""
    kept = set(canaries)
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]
