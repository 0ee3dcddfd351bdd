"""Models divided among emulated GPUs: how they are loaded, their plans, and budgets for a share of the experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from moec import runtime
from moec.artifacts.layout.footprint import footprint
from moec.runtime.experts.slots import state_bytes
from moec.runtime.memory.divided import DividedPlan
from tests.support.emulated_models import CACHE

Load: TypeAlias = Callable[..., runtime.Model]

WAYS = ["straight", "through the host"]
SPARE = 16 << 10
"""The division is chosen by what both GPUs need about, and held against what each needs."""


def on_two(bundle: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> Load:
    """``runtime.load`` of it on two GPUs, which reach each other or not."""
    monkeypatch.setenv("MOEC_STUB_GPUS", "2")
    monkeypatch.setenv("MOEC_STUB_PEERS", str(int(way == "straight")))

    def load(**options: Any) -> runtime.Model:
        facts: dict[str, Any] = {"device": ["cuda:0", "cuda:1"], "verify": "sizes", "cache_tokens": CACHE}
        facts |= {"max_batch": 3, "max_step_tokens": 160, "cpu_threads": 0}
        return runtime.load(bundle, **facts | options)

    return load


def divided(model: runtime.Model) -> DividedPlan:
    assert isinstance(model.memory, DividedPlan)
    return model.memory


def budgets(load: Load, share: float, *, staged: bool = True) -> list[int]:
    """For each of two GPUs: slots for about a share of its layers' experts, where ``staged`` beside a whole stage."""
    with load() as model:
        plans, sections = divided(model).plans, divided(model).sections
    found = []
    for plan, section in zip(plans, sections, strict=True):
        layers = footprint(section.bundle.model).layers
        stage = max(layer.experts * layer.stride_bytes for layer in layers) if staged else 0
        base = plan.total_bytes - plan.needs.expert_bytes - plan.needs.table_bytes + state_bytes(layers)
        found.append(base + stage + int(share * plan.needs.expert_bytes) + SPARE)
    return found
