"""Prefetch: whether guessing the next layer's experts gains anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.schedule import PrefetchPlan

if TYPE_CHECKING:
    from moec.artifacts.footprint import Footprint
    from moec.artifacts.machine import MachineRecord
    from moec.planning.analysis import Analysis
    from moec.planning.prediction import Placement


def prefetch_plan(
    machine: MachineRecord, facts: Footprint, analysis: Analysis, placement: Placement
) -> PrefetchPlan:
    """The candidate that gains the most, or none."""
    del machine, facts, analysis, placement
    return PrefetchPlan("none", 0, ())
