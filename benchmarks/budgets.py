"""Budgets of a GPU's memory that hold a wanted share of a model's experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.runtime.expert_slots import state_bytes

if TYPE_CHECKING:
    from moec.artifacts.footprint import Footprint
    from moec.runtime.device_budget import DevicePlan


def base_bytes(plan: DevicePlan) -> int:
    """What a resident model takes on a GPU besides its experts, for the same steps and cache."""
    return plan.total_bytes - plan.needs.expert_bytes - plan.needs.table_bytes


def share_limit(base: int, facts: Footprint, share: float) -> int:
    """``device_memory`` under which ``share`` of the routed experts have a slot, beside a stage for one layer's."""
    stage = max(layer.experts * layer.stride_bytes for layer in facts.layers)
    return base + stage + state_bytes(facts.layers) + int(share * facts.experts_bytes)
