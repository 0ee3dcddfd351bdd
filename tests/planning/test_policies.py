from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.artifacts.schedule import DEFAULT_POLICY, Policy, PolicyName
from moec.planning.policies import (
    EXPERT_BITS,
    MOST_USES,
    UNIT,
    PolicyState,
    always_admitting,
    count,
    divided,
    experts_of,
    faded,
    half_life_shift,
    initial_state,
    keys,
    replacements,
    worth_margin,
)
from moec.planning.routing.choice import CANDIDATES


def policy(name: PolicyName, prior: int = 0, half_life: int = 0) -> Policy:
    return Policy(name, prior, half_life, "always")


def run(which: Policy, shares: list[float], *tokens: list[int]) -> PolicyState:
    state = initial_state(which, shares)
    for chosen in tokens:
        index = np.array(chosen)
        count(which, state, (index,), np.ones_like(index), 1)
    return state


def leaving(which: Policy, state: PolicyState) -> list[int]:
    """Experts, the first to leave first."""
    order: list[int] = experts_of(np.sort(keys(which, state))).tolist()
    return order


def test_of_equal_scores_the_higher_number_leaves() -> None:
    for which in CANDIDATES:
        assert leaving(which, initial_state(which, [0.0] * 5)) == [4, 3, 2, 1, 0]


def test_lru_goes_by_the_last_choice() -> None:
    which = policy("lru")
    assert leaving(which, run(which, [0.0] * 3, [2], [0], [1], [0])) == [2, 1, 0]


def test_lfru_divides_uses_by_age() -> None:
    which = policy("lfru")
    state = run(which, [0.0] * 3, [0], [0], [0], [1], [2])
    scores = (keys(which, state) >> EXPERT_BITS).tolist()
    # Three uses two tokens ago, one use one token ago, one use just now.
    assert scores == [(3 * UNIT << 12) // 3, (UNIT << 12) // 2, UNIT << 12]


def test_uses_halve_and_the_prior_does_not() -> None:
    which = policy("lrfu", prior=4, half_life=8)
    state = run(which, [0.5, 0.25], [0], *[[1]] * 8)
    scores = (keys(which, state) >> EXPERT_BITS).tolist()
    assert scores[0] == UNIT // 2 + 4 * UNIT // 2
    assert state.prior.tolist() == [2 * UNIT, UNIT]


def test_fading_is_halving_with_straight_lines_between() -> None:
    ages = np.arange(0, 33)
    left = faded(np.full(33, UNIT), ages, 3)
    assert left[::8].tolist() == [UNIT, UNIT // 2, UNIT // 4, UNIT // 8, UNIT // 16]
    assert left[4] == UNIT * 3 // 4
    assert (np.diff(left) < 0).all()
    assert faded(np.array(MOST_USES), np.array(1 << 40), 2) == 0


@given(
    uses=st.integers(0, MOST_USES),
    age=st.integers(0, MOST_USES),
    shift=st.integers(0, 12),
    more=st.integers(0, 99),
)
def test_fading_never_rises_with_age_nor_falls_with_uses(uses: int, age: int, shift: int, more: int) -> None:
    def left(count: int, tokens: int) -> int:
        return int(faded(np.array(count), np.array(tokens), shift))

    assert 0 <= left(uses, age + more) <= left(uses, age) <= left(min(uses + more, MOST_USES), age)


@given(
    st.sampled_from(CANDIDATES),
    st.integers(0, MOST_USES),
    st.integers(0, MOST_USES),
    st.integers(0, MOST_USES),
)
def test_keys_fit_63_bits_at_the_ends_of_the_counters(
    which: Policy, uses: int, last: int, clock: int
) -> None:
    state = PolicyState(
        np.array([uses, MOST_USES]), np.array([min(last, clock), 0]), np.array([MOST_USES] * 2), clock
    )
    assert (keys(which, state) >= 0).all()
    assert experts_of(keys(which, state)).tolist() == [0, 1]


def test_uses_stop_where_32_bits_end() -> None:
    which = policy("lfru")
    state = initial_state(which, [0.0])
    count(which, state, (np.array([0]),), np.array([1 << 30]), 1)
    assert state.uses.tolist() == [MOST_USES]


def test_a_step_of_many_tokens_counts_each_choice() -> None:
    which = policy("lfru")
    state = initial_state(which, [0.0] * 3)
    count(which, state, (np.array([0, 2]),), np.array([3, 1]), 4)
    assert (state.uses // UNIT).tolist() == [3, 0, 1]
    assert state.last.tolist() == [4, 0, 4]
    assert state.clock == 4


def test_layers_are_counted_together_and_alike() -> None:
    which = DEFAULT_POLICY
    shares = np.random.default_rng(0).random((2, 5))
    both, apart = initial_state(which, shares), [initial_state(which, shares[layer]) for layer in range(2)]
    for chosen in ([[0, 3], [4, 1]], [[3, 2], [1, 0]]):
        index = np.array(chosen)
        count(which, both, (np.arange(2)[:, None], index), np.ones_like(index), 1)
        for layer in range(2):
            count(which, apart[layer], (index[layer],), np.ones(2, np.int64), 1)
    assert keys(which, both).tolist() == [keys(which, each).tolist() for each in apart]


def taken(which: Policy, some_keys: list[int], resident: list[int], chosen: list[int], slots: int) -> object:
    held = np.zeros(len(some_keys), np.bool_)
    held[resident] = True
    packed = (np.array(some_keys) << EXPERT_BITS) | (65535 - np.arange(len(some_keys)))
    return replacements(which, packed, held, chosen, slots)


def test_replacements() -> None:
    always, better = policy("lru"), Policy("lru", 0, 0, "better")
    assert taken(always, [5, 1, 9, 3], [0, 1], [2], 2) == [(2, 1)]
    assert taken(always, [5, 1, 9, 3], [0], [2], 2) == [(2, None)], "a free slot first"
    assert taken(always, [5, 1, 9, 3], [0, 1], [1, 3], 2) == [(3, 0)], "a chosen expert stays"
    assert taken(always, [5, 1, 9, 3], [0, 1], [2, 3], 2) == [(2, 1), (3, 0)]
    assert taken(always, [5, 1, 9, 3], [0], [0, 2], 1) == []
    assert taken(always, [5, 1, 9, 3], [], [2], 0) == []
    assert taken(better, [5, 1, 9, 3], [0, 2], [1, 3], 2) == [], "lesser scores than everybody's"
    assert taken(better, [5, 1, 9, 3], [0, 1], [3, 2], 2) == [(3, 1), (2, 0)]
    assert taken(better, [5, 4, 9, 3], [0, 1], [3, 2], 2) == [(2, 1)], "one that is turned away takes no turn"


def test_the_cpu_has_its_share_of_the_least_keys() -> None:
    layer_keys, resident = np.array([5, 1, 9, 3, 7]), np.array([True, False, False, False, False])

    def of(share: tuple[int, ...], margin: int, *, slots: int = 1, in_turn: bool = False) -> object:
        return divided(layer_keys, resident, [1, 2, 3], slots, share, margin, in_turn=in_turn)

    assert of((0, 0, 0, 0), 0) == ([1, 2, 3], []), "as they were chosen"
    assert of((0, 1, 1, 2), 0) == ([2], [3, 1])
    assert of((0, 1), 0) == ([2, 3], [1]), "the last entry is true of more"
    everything = (0, 1, 2, 3)
    assert of(everything, 3) == ([2], [3, 1]), "9 is more than 3 above the 5 that can leave"
    assert of(everything, 4) == ([], [2, 3, 1])
    assert of(everything, 4, slots=2) == ([2], [3, 1]), "a slot is free"
    assert of(everything, 0, slots=2, in_turn=True) == ([2], [3, 1])
    assert of(everything, -1) == ([], [2, 3, 1])
    assert of(everything, -1, in_turn=True) == ([2], [3, 1])
    assert divided(layer_keys, resident, [0, 2], 1, everything, 0, in_turn=False) == ([], [2]), (
        "who is chosen stays"
    )


def test_margins_are_uses_where_a_policy_counts_them() -> None:
    assert worth_margin(policy("lrfu", 0, 16), 1.5) == UNIT * 3 // 2 << EXPERT_BITS
    assert worth_margin(policy("lfu", 0, 4096), 2) == 2 * UNIT << EXPERT_BITS
    assert worth_margin(policy("lru"), 1.5) == worth_margin(policy("static"), 2) == -1


def test_half_lives_are_shifts() -> None:
    assert [half_life_shift(policy("lrfu", 0, life)) for life in (0, 1, 2, 16, 4096)] == [0, 0, 1, 4, 12]


@pytest.mark.parametrize("which", CANDIDATES)
def test_host_memory_lets_every_missed_expert_in(which: Policy) -> None:
    admitting = always_admitting(which)
    assert admitting.admission == "always"
    assert admitting.name != "static"
    assert which.admission != "always" or admitting == which
