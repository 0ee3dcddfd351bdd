from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.artifacts.layout.footprint import footprint
from moec.artifacts.schedule import Budgets
from moec.planning.planner import plan, plan_analysed
from moec.planning.routing.analysis import analyse
from moec.planning.routing.choice import CANDIDATES
from moec.planning.routing.replay import stack_distances
from moec.runtime.experts.residency import LayerPlan, Residency, plan_layers, split_rows
from tests.support.expert_plans import LFRU, LRU, uniform_plans
from tests.support.tiny_bundle import CPU, tiny_model, tiny_traces

if TYPE_CHECKING:
    from moec.artifacts.schedule import Policy


POLICIES = [policy for policy in CANDIDATES if policy.admission == "always"]


def layer(experts: int, slots: int, order: tuple[int, ...] = (), spare: int = 0) -> LayerPlan:
    return LayerPlan(10, slots, spare, order or tuple(range(experts)), (0.0,) * experts)


def use(residency: Residency, number: int, *experts: int) -> list[tuple[int, int]]:
    ids = np.array(experts, np.int64)
    return list(residency.use(number, ids, np.ones(len(ids), np.int64), 1).evicted)


def test_lru_evicts_the_expert_used_longest_ago() -> None:
    residency = Residency((layer(4, 3),), LRU)
    for expert in (0, 1, 2, 0):
        assert use(residency, 0, expert) == []
    assert use(residency, 0, 3) == [(0, 1)]
    assert use(residency, 0, 1) == [(0, 2)]


def test_lfru_keeps_an_often_used_expert_through_a_burst() -> None:
    residency = Residency((layer(4, 2),), LFRU)
    for _ in range(20):
        use(residency, 0, 0)
    use(residency, 0, 1)
    assert use(residency, 0, 2) == [(0, 1)]
    assert use(residency, 0, 3) == [(0, 2)]


def test_uses_start_at_the_prior() -> None:
    plan = dataclasses.replace(layer(4, 2), use_shares=(0.9, 0.1, 0.0, 0.0))
    residency = Residency((plan,), LFRU)
    assert residency.seed() == [(0, 1)]
    assert use(residency, 0, 2) == [(0, 1)]
    assert use(residency, 0, 3) == [(0, 2)]


def test_ties_fall_to_the_expert_with_the_higher_number() -> None:
    residency = Residency((layer(3, 2, (1, 2, 0)),), LRU)
    use(residency, 0, 0, 1)
    assert use(residency, 0, 2) == [(0, 1)]


def test_layers_do_not_take_from_each_other() -> None:
    residency = Residency((layer(2, 2), layer(3, 2)), LRU)
    assert use(residency, 0, 0, 1) == []
    assert use(residency, 1, 0, 1) == []
    assert use(residency, 1, 2) == [(1, 1)]
    assert residency.resident_bytes == 40


def test_an_expert_without_a_slot_is_dropped_at_the_next_use_of_any_layer() -> None:
    residency = Residency((layer(4, 1, spare=2), layer(4, 2)), LRU)
    assert residency.capacity(0) == 3
    assert use(residency, 0, 2, 0, 3) == []
    assert residency.resident_bytes == 30
    assert use(residency, 1, 0) == [(0, 0), (0, 3)]
    assert residency.resident[0].tolist() == [False, False, True, False]
    assert residency.resident_bytes == 20


def test_a_budget_for_everything_is_not_bounded() -> None:
    shapes = [(2, 1, 30), (3, 1, 10)]
    assert not Residency(uniform_plans(shapes, 90), LRU).bounded
    assert Residency(uniform_plans(shapes, 89), LRU).bounded


@given(
    st.integers(2, 24),
    st.sampled_from(POLICIES),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 7), min_size=1, max_size=2)), max_size=60),
)
def test_resident_bytes_stay_within_the_capacity_and_match_the_table(
    capacity: int, policy: Policy, seeded: bool, uses: list[tuple[int, set[int]]]
) -> None:
    residency = Residency(uniform_plans([(8, 2, 7)] * 3, capacity * 7), policy)
    resident: set[tuple[int, int]] = set()
    if seeded:
        resident = {(number, e) for number, seeds in enumerate(residency.seed()) for e in seeds}
    for number, experts in uses:
        change = residency.use(number, np.array(sorted(experts)), np.ones(len(experts), np.int64), 1)
        resident -= set(change.evicted)
        assert {(number, expert) for expert in experts} - resident == {(number, e) for e in change.missed}
        resident |= {(number, e) for e in experts}
        assert change.bytes_moved == 7 * len(change.missed)
        assert residency.resident_bytes == 7 * len(resident) <= capacity * 7
        table = [np.flatnonzero(each).tolist() for each in residency.resident]
        assert {(n, e) for n, each in enumerate(table) for e in each} == resident


@settings(max_examples=60)
@given(
    policy=st.sampled_from(POLICIES),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    slots=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_hits_are_those_that_the_planner_simulates(
    policy: Policy, experts: int, top_k: int, slots: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    scores = random.gumbel(size=(30, experts)) - 0.3 * np.arange(experts)
    chosen = np.argsort(-scores, axis=1)[:, : min(top_k, experts)]
    order, prior = random.permutation(experts).tolist(), random.random(experts).tolist()
    plan = LayerPlan(1, min(slots, experts), top_k, tuple(order), tuple(prior))
    residency = Residency((plan,), policy)
    residency.seed()
    # With every expert in its slot nothing is counted, and nothing needs to be.
    missed = [set(residency.use(0, row, np.ones_like(row), 1).missed) for row in chosen]
    hits = [[expert not in gone for expert in row] for row, gone in zip(chosen.tolist(), missed, strict=True)]
    assert hits == (stack_distances(policy, chosen[None], [order], [prior])[0] <= plan.slots).tolist()


@pytest.mark.parametrize("room", [2, 3, 5, 8, 11, 14])
def test_the_runtime_keeps_what_the_planner_planned_and_hits_what_it_predicted(room: int) -> None:
    model = tiny_model()
    needs, traces = footprint(model), tiny_traces(model)
    analysis = analyse(traces, model)
    enough = plan(traces, model, Budgets(0, 1 << 30, 64, 8), CPU)
    host = enough.host.total - enough.host.experts + room * needs.layers[0].stride_bytes
    schedule = plan_analysed(analysis, model, Budgets(0, host, 64, 8), CPU)
    rest = dataclasses.replace(schedule.host, experts=0, stream_buffers=0)
    plans = plan_layers(needs.layers, analysis.profile, host - rest.total)
    assert [each.slots for each in plans] == [each.host_experts for each in schedule.layers]
    assert schedule.host.total <= host
    residency = Residency(plans, schedule.policy)
    residency.seed()
    # What the planner replays: tokens that were generated.
    tokens = np.flatnonzero(~traces.prefill)
    misses = 0
    for token in tokens:
        for number, trace in enumerate(traces.layers):
            row: Any = trace.chosen[token].astype(np.int64)
            misses += len(residency.use(number, row, np.ones_like(row), 1).missed)
            assert residency.resident_bytes <= host - rest.total
    uses = len(tokens) * sum(each.top_k for each in needs.layers)
    assert 1 - misses / uses == pytest.approx(schedule.prediction.hit_rate)


@given(
    st.lists(st.lists(st.integers(-1, 9), min_size=3, max_size=3), min_size=1, max_size=30),
    st.integers(3, 9),
)
def test_rows_are_split_into_parts_that_fit(index: list[list[int]], capacity: int) -> None:
    ranges = split_rows(np.array(index), 9, capacity)
    assert [row for start, end in ranges for row in range(start, end)] == list(range(len(index)))
    for start, end in ranges:
        chosen = {e for row in index[start:end] for e in row if 0 <= e < 9}
        assert end > start
        assert len(chosen) <= capacity
