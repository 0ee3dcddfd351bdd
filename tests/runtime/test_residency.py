from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moec.runtime.residency import Residency, split_rows


def use(residency: Residency, layer: int, *experts: int) -> list[tuple[int, int]]:
    ids = np.unique(experts).astype(np.int64)
    return list(residency.use(layer, ids, np.ones(len(ids), np.int64), 1).evicted)


def test_lru_evicts_the_expert_used_longest_ago() -> None:
    residency = Residency((4,), (10,), 30, "lru")
    for expert in (0, 1, 2, 0):
        assert use(residency, 0, expert) == []
    assert use(residency, 0, 3) == [(0, 1)]
    assert use(residency, 0, 1) == [(0, 2)]


def test_lfru_keeps_an_often_used_expert_through_a_burst() -> None:
    residency = Residency((4,), (10,), 20, "lfru")
    for _ in range(20):
        use(residency, 0, 0)
    use(residency, 0, 1)
    assert use(residency, 0, 2) == [(0, 1)]
    assert use(residency, 0, 3) == [(0, 2)]


def test_ties_fall_to_the_expert_that_the_profile_ranks_last() -> None:
    rank = np.array([[2, 0, 1]])
    residency = Residency((3,), (10,), 20, "lru", rank)
    residency.use(0, np.array([0, 1]), np.array([1, 1]), 1)
    assert use(residency, 0, 2) == [(0, 0)]


def test_experts_of_other_layers_make_room() -> None:
    residency = Residency((2, 3), (30, 10), 60, "lru")
    assert use(residency, 0, 0, 1) == []
    assert use(residency, 1, 0, 1, 2) == [(0, 1)]
    assert residency.resident_bytes == 60


def test_a_budget_for_everything_is_not_bounded() -> None:
    assert not Residency((2, 3), (30, 10), 90).bounded
    assert Residency((2, 3), (30, 10), 89).bounded


@given(
    st.integers(2, 5),
    st.sampled_from(["lru", "lfru"]),
    st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 7), min_size=1, max_size=2)), max_size=60),
)
def test_resident_bytes_stay_within_the_capacity_and_match_the_table(
    capacity: int, policy: str, uses: list[tuple[int, set[int]]]
) -> None:
    residency = Residency((8, 8, 8), (7, 7, 7), capacity * 7, policy)  # type: ignore[arg-type]
    resident: set[tuple[int, int]] = set()
    for layer, experts in uses:
        change = residency.use(layer, np.array(sorted(experts)), np.ones(len(experts), np.int64), 1)
        assert {(layer, expert) for expert in experts} - resident == {(layer, e) for e in change.missed}
        assert not {(layer, expert) for expert in experts} & set(change.evicted)
        resident = (resident | {(layer, e) for e in experts}) - set(change.evicted)
        assert change.bytes_moved == 7 * len(change.missed)
        assert residency.resident_bytes == 7 * len(resident) <= capacity * 7
        assert {tuple(place) for place in np.argwhere(residency.resident).tolist()} == resident


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
