"""Device memory that leaves room for a share of a model's experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.footprint import footprint
from moec.runtime.device_budget import DevicePlan
from moec.runtime.expert_slots import state_bytes

if TYPE_CHECKING:
    from moec.runtime import Model


def device_limit(resident: Model, share: float) -> int:
    """Bytes of the GPU that a load like ``resident`` needs to keep ``share`` of the experts.

    Beside the slots there is the stage, room for the experts of one layer, which every offloaded run has.

    Args:
        resident: loaded with all its experts on the GPU.
        share: 0 to 1.
    """
    plan, facts = resident.memory, footprint(resident.record)
    assert isinstance(plan, DevicePlan)
    base = plan.total_bytes - plan.needs.expert_bytes - plan.needs.table_bytes
    stage = max(layer.experts * layer.stride_bytes for layer in facts.layers)
    return base + stage + state_bytes(facts.layers) + int(share * facts.experts_bytes)
