from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.schedule.policies import POLICIES, hit_curve, stack_distances

if TYPE_CHECKING:
    from collections.abc import Sequence


def trace(experts: int, top_k: int, tokens: int, seed: int) -> npt.NDArray[Any]:
    random = np.random.default_rng(seed)
    scores = random.gumbel(size=(tokens, experts)) - 0.3 * np.arange(experts)
    return np.argsort(-scores, axis=1)[:, :top_k].astype(np.uint8)


def simulate(
    policy: str, chosen: npt.NDArray[Any], order: Sequence[int], prior: Sequence[float], slots: int
) -> list[list[bool]]:
    """The cache as a runtime would run it, for one number of slots: a set, and who leaves it."""
    rows = chosen.tolist()
    scorer = POLICIES[policy](rows, prior)
    rank = {expert: place for place, expert in enumerate(order)}
    cache = set(order[:slots])
    hits: list[list[bool]] = []
    for token, experts in enumerate(rows):
        hits.append([expert in cache for expert in experts])
        for expert in experts:
            free = cache - set(experts)
            if expert in cache or not free:
                continue
            cache.remove(min(free, key=lambda e: (scorer.score(e, token), -rank[e])))
            cache.add(expert)
        for expert in experts:
            scorer.use(expert, token)
    return hits


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    tokens=st.integers(0, 30),
    seed=st.integers(0, 1000),
)
def test_one_pass_tells_what_each_number_of_slots_would_hit(
    policy: str, experts: int, top_k: int, tokens: int, seed: int
) -> None:
    chosen = trace(experts, min(top_k, experts), tokens, seed)
    random = np.random.default_rng(seed)
    order, prior = random.permutation(experts).tolist(), random.random(experts).tolist()
    distances = stack_distances(policy, chosen, order, prior)
    for slots in range(experts + 1):
        assert (distances <= slots).tolist() == simulate(policy, chosen, order, prior, slots), slots


def test_belady_is_the_best_and_full_slots_hit_everything() -> None:
    chosen = trace(16, 4, 200, 3)
    order = list(range(16))
    curves = {
        policy: hit_curve(stack_distances(policy, chosen, order, [0.0] * 16), 16) for policy in POLICIES
    }
    for policy, curve in curves.items():
        assert curve[0] == 0
        assert curve[-1] == 1
        assert np.all(np.diff(curve) >= 0)
        assert np.all(curves["belady"][4:] >= curve[4:]), policy
    assert curves["belady"][8] > curves["lru"][8]


def test_frequency_beats_recency_where_use_is_skewed_and_steady() -> None:
    chosen = trace(32, 2, 600, 5)
    order = list(range(32))
    lfru, lru = (
        hit_curve(stack_distances(name, chosen, order, [0.0] * 32), 32)[8] for name in ("lfru", "lru")
    )
    assert lfru > lru


def test_lru_by_hand() -> None:
    chosen = np.array([[2], [0], [2], [1], [1]])
    assert stack_distances("lru", chosen, [0, 1, 2], [0.0] * 3).tolist() == [[3], [2], [2], [3], [1]]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_tokens(policy: str) -> None:
    distances = stack_distances(policy, np.zeros((0, 2), np.uint8), [0, 1], [0.0, 0.0])
    assert distances.shape == (0, 2)
    assert hit_curve(distances, 2).tolist() == [0, 0, 0]
