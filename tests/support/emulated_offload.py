"""Experts off the emulated GPU: budgets for a share of them, what a model answers, and whether its slots are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec import runtime
from moec.artifacts.files.bundle import Bundle
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.layout.footprint import footprint
from moec.runtime.device import PackedCall, View
from moec.runtime.devices.cuda.device import BOUNCE_BYTES
from moec.runtime.devices.cuda.graphs import CallList
from moec.runtime.devices.cuda.offload.calls import OffloadedExperts
from moec.runtime.experts.ahead import AheadPlan, plan_ahead
from moec.runtime.experts.slots import SlotPlan, state_bytes
from moec.runtime.memory.device_budget import DevicePlan
from tests.support.emulated_models import CACHE, PROMPTS, planned, rows

LONG = [int(token) for token in np.random.default_rng(0).integers(2, 90, 150)]
"""Chooses more experts than the kernels of the cache take at once: its step is streamed."""


def resident(bundle: Path) -> dict[str, Any]:
    with runtime.load(
        bundle, device="cuda:0", verify="sizes", cache_tokens=CACHE, max_batch=3, max_step_tokens=160
    ) as model:
        return {"plan": planned(model), **answers(model)}


def answers(model: runtime.Model) -> dict[str, Any]:
    return {
        "one": rows(model, [PROMPTS[0]]),
        "three": rows(model, [list(prompt) for prompt in PROMPTS], max_new_tokens=6),
        "long": rows(model, [LONG], max_new_tokens=2),
        "logits": model.forward([LONG[:40]]).tobytes(),
    }


def budget(expected: dict[str, Any], share: float, bundle: Path) -> int:
    """Device memory that leaves room for a share of the experts."""
    plan: DevicePlan = expected["plan"]
    facts = footprint(open_bundle(bundle, verify="sizes").model)
    base = plan.total_bytes - plan.needs.expert_bytes - plan.needs.table_bytes + state_bytes(facts.layers)
    return base + int(share * facts.experts_bytes)


def host_budget(expected: dict[str, Any], share: float, bundle: Path) -> int:
    """Host memory that leaves room for a share of the experts."""
    experts = footprint(open_bundle(bundle, verify="sizes").model).experts_bytes
    plan: DevicePlan = expected["plan"]
    return int(share * experts) + BOUNCE_BYTES + plan.needs.staging_bytes


def planned_ahead(bundle: Path) -> AheadPlan:
    """What is brought ahead where it is asked for and no schedule says how much."""
    opened = open_bundle(bundle, verify="sizes")
    plan = plan_ahead(opened, footprint(opened.model), None, True)
    assert plan is not None
    return plan


def slots_of(model: runtime.Model) -> SlotPlan:
    slots = planned(model).slots
    assert slots is not None
    return slots


def parts(model: runtime.Model) -> OffloadedExperts:
    found: OffloadedExperts = model.engine._executor.sections[0].experts  # type: ignore[attr-defined]
    return found


def cut_step(
    model: runtime.Model, prompt: list[int], fetch: int, files: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that ends when slots are assigned, before the fetch of that number; every slot is right afterwards."""
    with monkeypatch.context() as patch:
        patch.setattr(CallList, "_run_each", _cut_before_a_fetch(model, fetch))
        with pytest.raises(KeyboardInterrupt):
            rows(model, [prompt])
    parts(model)._device.unfinished.mend()
    check_slots(model, files)


def _cut_before_a_fetch(model: runtime.Model, number: int) -> Callable[[CallList], None]:
    """Assigns the slots of a layer, and is interrupted."""
    left = [number]
    experts = parts(model)
    fetches = experts._fetch if experts.feeder is None else experts.feeder._order

    def run(calls: CallList) -> None:
        for call in calls._calls:
            if isinstance(call, PackedCall):
                if call.function is fetches:
                    if not left[0]:
                        raise KeyboardInterrupt
                    left[0] -= 1
                call.function(*call.arguments)

    return run


def check_slots(model: runtime.Model, files: Bundle) -> None:
    """Every expert that has a slot is there."""
    for number, residents in enumerate(parts(model).slots.states.residents()):
        first, own = parts(model).slots.slot_addresses[number], slots_of(model).layers[number]
        for expert in np.flatnonzero(residents >= 0).tolist():
            view = View(first + int(residents[expert]) * own.stride_bytes, "uint8", (own.stride_bytes,))
            wanted = files.expert_view(model.record.experts[number].layer, expert)
            np.testing.assert_array_equal(parts(model)._device.read(view), wanted)
