"""How a model is divided among GPUs before anything is allocated, on a bundle made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moec.artifacts.files.bundle import Bundle
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.layout.footprint import footprint
from moec.errors import BudgetError, DeviceError
from moec.runtime.devices.cuda.measure import CopySpeeds
from moec.runtime.memory.cuda_planning import CudaOptions
from moec.runtime.memory.divided import DividedPlan, DivisionPlanner
from tests.support.tiny_bundle import make_bundle

SLOW, FAST = CopySpeeds(100.0, 10.0), CopySpeeds(300.0, 10.0)
HALVES = 2 * (SLOW,)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(make_bundle(tmp_path_factory.mktemp("bundle") / "tiny.moec"), verify="sizes")


def planner(
    bundle: Bundle, limits: tuple[int, ...], speeds: tuple[CopySpeeds, ...] = HALVES
) -> DivisionPlanner:
    gpus = len(limits)
    options = CudaOptions(
        tuple(range(gpus)), (None,) * gpus, "1GiB", None, 2, 16, 64, False, None, False, "sizes"
    )
    return DivisionPlanner(bundle, (bundle.target("cpu"),) * gpus, options, limits, speeds)


def cuts(plan: DividedPlan) -> list[int]:
    return [section.first for section in plan.sections[1:]]


def test_all_experts_where_they_fit_else_a_cache_on_each_gpu(bundle: Bundle) -> None:
    """Layers are alike but for their experts: 8 of the first, 6 of the second."""
    resident = planner(bundle, (64 << 20, 64 << 20)).resident()
    assert resident is not None
    assert [plan.slots for plan in resident.plans] == [None, None]
    assert cuts(resident) == [4]
    assert resident.expert_bytes == footprint(bundle.model).experts_bytes
    first, second = resident.plans
    assert first.cache_pages == second.cache_pages == resident.cache_pages == 2
    assert first.needs.sampler_bytes < second.needs.sampler_bytes
    limits = (first.total_bytes, second.total_bytes - 1)
    assert planner(bundle, limits).resident() is None
    offloaded = planner(bundle, limits).offloaded(shared=False)
    assert any(plan.slots is not None for plan in offloaded.plans)
    assert all(plan.total_bytes <= limit for plan, limit in zip(offloaded.plans, limits, strict=True))


def test_a_faster_gpu_gets_more(bundle: Bundle) -> None:
    """Of the places 1 and 4: whoever is faster runs both layers, unless it is so by chance."""
    limits, nearly = (64 << 20, 64 << 20), CopySpeeds(110.0, 9.5)
    for speeds, expected in (((SLOW, FAST), 1), ((FAST, SLOW), 4), ((SLOW, nearly), 4), ((nearly, SLOW), 4)):
        plan = planner(bundle, limits, speeds).resident()
        assert plan is not None
        assert cuts(plan) == [expected]


def test_budgets_that_hold_too_little_are_named(bundle: Bundle) -> None:
    with pytest.raises(
        BudgetError, match=r"hold the model: 1048576 bytes \(1.0 MiB\) and 2097152 bytes"
    ) as caught:
        planner(bundle, (1 << 20, 2 << 20)).offloaded(shared=True)
    assert "for 64 tokens" in caught.value.why


def test_more_gpus_than_parts_and_models_behind_an_encoder_are_refused(bundle: Bundle) -> None:
    with pytest.raises(DeviceError, match="among 4 GPUs") as caught:
        planner(bundle, (1 << 30,) * 4, 4 * (SLOW,))
    assert "3 parts at most" in caught.value.why
    encoder = replace(bundle, model=replace(bundle.model, encoder=bundle.model.steps[:1]))
    with pytest.raises(DeviceError, match="among 2 GPUs") as caught:
        planner(encoder, (1 << 30,) * 2)
    assert caught.value.do == "Give one GPU."
