"""Budgets of a GPU's memory that hold a wanted share of a model's experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.files.reader import open_bundle
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.sections import whole_section
from moec.runtime.devices.cuda.device import BOUNCE_BYTES
from moec.runtime.devices.cuda.offload.helping import device_bytes
from moec.runtime.engine.pages import pages_for
from moec.runtime.experts.slots import state_bytes
from moec.runtime.memory.device_budget import DevicePlan, device_needs

if TYPE_CHECKING:
    from pathlib import Path

    from moec.artifacts.layout.footprint import Footprint


def resident_plan(bundle: Path, *, max_batch: int, step_tokens: int, cache_tokens: int) -> DevicePlan:
    """What a load with all experts on a GPU takes, for a bundle with code for one; nothing is loaded."""
    opened = open_bundle(bundle, verify="sizes")
    target = next(target for target in opened.manifest.targets if target.name.startswith("cuda"))
    needs = device_needs(whole_section(opened), target, max_batch=max_batch, max_step_tokens=step_tokens)
    return DevicePlan(needs, pages_for(cache_tokens), limit_bytes=0)


def base_bytes(plan: DevicePlan) -> int:
    """What a resident model takes on a GPU besides its experts, for the same steps and cache."""
    return plan.total_bytes - plan.needs.expert_bytes - plan.needs.table_bytes


def share_limit(base: int, facts: Footprint, share: float) -> int:
    """``device_memory`` under which ``share`` of the routed experts have a slot, beside a stage for one layer's."""
    stage = max(layer.experts * layer.stride_bytes for layer in facts.layers)
    return base + stage + state_bytes(facts.layers) + int(share * facts.experts_bytes)


def limit_of_share(
    bundle: Path, share: float, threads: int, *, max_batch: int, step_tokens: int, cache_tokens: int
) -> int:
    """`share_limit` of a bundle, with room for what ``threads`` of the CPU need where they help.

    Less than a resident load takes, however few the experts.
    """
    plan = resident_plan(bundle, max_batch=max_batch, step_tokens=step_tokens, cache_tokens=cache_tokens)
    record = open_bundle(bundle, verify="sizes").model
    beside = device_bytes(record, step_tokens) if threads else 0
    return min(share_limit(base_bytes(plan) + beside, footprint(record), share), plan.total_bytes - 1)


def host_limit(plan: DevicePlan, facts: Footprint, share: float) -> int:
    """``host_memory`` under which ``share`` of the routed experts are pinned, without the CPU's help."""
    return int(share * facts.experts_bytes) + BOUNCE_BYTES + plan.needs.staging_bytes
