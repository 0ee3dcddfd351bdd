"""How experts are divided between the GPU, host memory and the file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.artifacts.ids import LayerId
from moec.artifacts.layout.footprint import LayerFootprint
from moec.artifacts.schedule import DEFAULT_POLICY, LayerProfile, RoutingProfile
from moec.errors import BudgetError
from moec.runtime.experts.slots import SlotPlan, plan_slots

SIZE = 100
LAYERS = tuple(LayerFootprint(LayerId(n), experts, 2, 90, SIZE, 60) for n, experts in enumerate((8, 4, 6)))
ALL = SIZE * sum(layer.experts for layer in LAYERS)


def plan(device: int, host: int = ALL, max_batch: int = 1, streamed_from: int | None = None) -> SlotPlan:
    layers = tuple(
        LayerProfile(
            layer.layer,
            tuple(reversed(range(layer.experts))),
            (2 / layer.experts,) * layer.experts,
            tuple(2 / (rank + 1 + layer.layer) for rank in range(layer.experts)),
            (),
        )
        for layer in LAYERS
    )
    profile = RoutingProfile("uniform", 0, 0, layers)
    return plan_slots(
        LAYERS,
        profile,
        DEFAULT_POLICY,
        streamed_from,
        device_bytes=device,
        host_bytes=host,
        max_batch=max_batch,
    )


@given(st.integers(0, 2 * ALL), st.integers(0, 2 * ALL), st.integers(1, 5))
def test_no_budget_is_passed(device: int, host: int, max_batch: int) -> None:
    try:
        found = plan(device, host, max_batch)
    except BudgetError:
        assert host < ALL
        return
    assert found.slot_bytes + found.stage_bytes <= device
    assert found.host_bytes + found.file_places * SIZE <= host or found.file_places == 0
    assert (found.file_places > 0) == (host < ALL)
    for layer in found.layers:
        assert 0 <= layer.slots <= layer.experts
        assert 0 <= layer.hosted <= layer.experts


def test_the_stage_comes_first_then_slots_where_they_are_worth_the_most() -> None:
    assert (plan(450).stage_bytes, plan(450).slot_bytes) == (400, 0)
    found = plan(800 + 3 * SIZE)
    assert found.stage_bytes == 800
    assert [layer.slots for layer in found.layers] == [2, 1, 0]
    assert found.stage_places(0) == 8


def test_experts_beyond_host_memory_need_room_on_their_way() -> None:
    found = plan(2000, ALL - 1)
    assert found.file_places == 4
    assert sum(layer.hosted for layer in found.layers) == 18 - 1 - 4
    with pytest.raises(BudgetError, match="host_memory is 50 bytes too small"):
        plan(2000, 350)


def test_a_step_is_streamed_when_it_must_be_or_when_the_schedule_says_so() -> None:
    assert not plan(2000).is_streamed(0, 128)
    assert plan(2000).is_streamed(0, 129)
    assert plan(2000, streamed_from=40).is_streamed(0, 40)
    assert not plan(2000, streamed_from=40).is_streamed(0, 39)
    # Two tokens may want four experts of the file, and there is room for four.
    assert not plan(2000, ALL - 1).is_streamed(0, 2)
    assert plan(2000, ALL - SIZE * 8).is_streamed(0, 3)
