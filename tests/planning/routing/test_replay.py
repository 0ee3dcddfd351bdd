from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.artifacts.schedule import Policy
from moec.artifacts.traces import repeats
from moec.planning.policies import replacements
from moec.planning.routing.replay import (
    OptimalKeys,
    PolicyKeys,
    hit_curve,
    optimal_distances,
    stack_distances,
    use_shares,
)

if TYPE_CHECKING:
    from moec.planning.routing.replay import Keys

POLICIES = [
    Policy("lru", 0, 0, "always"),
    Policy("lfru", 8, 0, "always"),
    Policy("lfru", 8, 0, "better"),
    Policy("lrfu", 4, 8, "always"),
    Policy("lrfu", 4, 16, "better"),
    Policy("lfu", 16, 4096, "always"),
    Policy("lfu", 16, 4096, "better"),
    Policy("static", 16, 0, "better"),
]


def trace(experts: int, top_k: int, tokens: int, seed: int) -> npt.NDArray[Any]:
    random = np.random.default_rng(seed)
    scores = random.gumbel(size=(tokens, experts)) - 0.3 * np.arange(experts)
    return np.argsort(-scores, axis=1)[:, :top_k]


def simulate(
    source: Keys, policy: Policy, chosen: list[list[int]], order: list[int], slots: int
) -> list[Any]:
    """The cache as a runtime runs it, for one layer and one number of slots."""
    resident = np.zeros(len(order), np.bool_)
    resident[order[:slots]] = True
    hits = []
    for token, experts in enumerate(chosen):
        hits.append([bool(resident[expert]) for expert in experts])
        keys = source.after(token, np.array([experts]))[0]
        for expert, victim in replacements(policy, keys, resident, experts, slots):
            if victim is not None:
                assert resident[victim]
                resident[victim] = False
            resident[expert] = True
        assert resident.sum() == slots
    return hits


def most_hits(chosen: npt.NDArray[Any], order: list[int], slots: int) -> int:
    """By trying everything that a cache of so many slots could keep after each token."""
    best = {frozenset(order[:slots]): 0}
    for experts in chosen.tolist():
        after: dict[frozenset[int], int] = {}
        for kept, hits in best.items():
            now = hits + len(kept & set(experts))
            for held in combinations(sorted(kept | set(experts)), slots):
                after[frozenset(held)] = max(now, after.get(frozenset(held), 0))
        best = after
    return max(best.values())


@settings(max_examples=60)
@given(
    policy=st.sampled_from(POLICIES),
    experts=st.integers(1, 7),
    tokens=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_an_expert_that_comes_again_in_a_row_is_no_other_use(
    policy: Policy, experts: int, tokens: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    chosen = random.integers(0, experts, (tokens, 3))
    order, shares = random.permutation(experts), random.random(experts)
    (distances,) = stack_distances(policy, chosen[None], order[None], shares[None])
    once = [list(dict.fromkeys(row)) for row in chosen.tolist()]
    for slots in range(experts + 1):
        hits = simulate(PolicyKeys(policy, shares), policy, once, order.tolist(), slots)
        assert [row[row > 0].tolist() for row in distances] == [
            row[~again].tolist() for row, again in zip(distances, repeats(chosen), strict=True)
        ]
        assert [(row[row > 0] <= slots).tolist() for row in distances] == hits
    used = use_shares(chosen[None], experts)[0]
    assert used.sum() * max(1, tokens) == pytest.approx(sum(map(len, once)))


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 5), top_k=st.integers(1, 3), tokens=st.integers(0, 8), seed=st.integers(0, 1000)
)
def test_beladys_optimum_is_the_most_that_any_cache_hits(
    experts: int, top_k: int, tokens: int, seed: int
) -> None:
    chosen = trace(experts, min(top_k, experts), tokens, seed)
    order = np.random.default_rng(seed).permutation(experts)
    distances = optimal_distances(chosen[None], order[None], "better")
    for slots in range(experts + 1):
        assert (distances <= slots).sum() == most_hits(chosen, order.tolist(), slots), slots


@settings(max_examples=80)
@given(
    policy=st.sampled_from(POLICIES),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    tokens=st.integers(0, 30),
    seed=st.integers(0, 1000),
)
def test_one_pass_tells_what_each_number_of_slots_would_hit(
    policy: Policy, experts: int, top_k: int, tokens: int, seed: int
) -> None:
    chosen = np.stack([trace(experts, min(top_k, experts), tokens, seed + layer) for layer in range(2)])
    random = np.random.default_rng(seed)
    order = np.stack([random.permutation(experts) for _ in range(2)])
    shares = random.random((2, experts))
    distances = stack_distances(policy, chosen, order, shares)
    optimal = optimal_distances(chosen, order, "always")
    always = replace(policy, admission="always")
    for layer in range(2):
        for slots in range(experts + 1):
            keys: Keys = PolicyKeys(policy, shares[layer])
            hits = simulate(keys, policy, chosen[layer].tolist(), order[layer].tolist(), slots)
            assert (distances[layer] <= slots).tolist() == hits, slots
            keys = OptimalKeys(chosen[layer : layer + 1], experts)
            hits = simulate(keys, always, chosen[layer].tolist(), order[layer].tolist(), slots)
            assert (optimal[layer] <= slots).tolist() == hits, slots


def test_belady_is_the_best_and_full_slots_hit_everything() -> None:
    chosen, order = trace(16, 4, 200, 3)[None], np.arange(16)[None]
    best = {
        admission: hit_curve(optimal_distances(chosen, order, admission), 16)
        for admission in ("always", "better")
    }
    assert np.all(best["better"] >= best["always"])
    for policy in POLICIES:
        curve = hit_curve(stack_distances(policy, chosen, order, np.full((1, 16), 0.25)), 16)
        assert (curve[0], curve[-1]) == (0, 1)
        assert np.all(np.diff(curve) >= 0)
        assert np.all(best[policy.admission] >= curve), policy
        assert best[policy.admission][8] > curve[8]


def test_frequency_beats_recency_where_use_is_skewed_and_steady() -> None:
    chosen, order, shares = trace(32, 2, 600, 5)[None], np.arange(32)[None], np.zeros((1, 32))
    lru, lfu = (
        hit_curve(stack_distances(policy, chosen, order, shares), 32)[8]
        for policy in (POLICIES[0], POLICIES[5])
    )
    assert lfu > lru


def test_static_keeps_its_seeds() -> None:
    chosen = trace(12, 3, 50, 1)[None]
    shares = np.linspace(1, 0, 12)[None]
    distances = stack_distances(POLICIES[-1], chosen, np.arange(12)[None], shares)
    assert (distances == chosen + 1).all()


def test_lru_by_hand() -> None:
    chosen = np.array([[[2], [0], [2], [1], [1]]])
    assert stack_distances(POLICIES[0], chosen, [[0, 1, 2]], np.zeros((1, 3))).ravel().tolist() == [
        3,
        2,
        2,
        3,
        1,
    ]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.name}-{policy.admission}")
def test_no_tokens(policy: Policy) -> None:
    distances = stack_distances(policy, np.zeros((1, 0, 2), np.uint8), [[0, 1]], np.zeros((1, 2)))
    assert distances.shape == (1, 0, 2)
    assert hit_curve(distances, 2).tolist() == [0, 0, 0]
