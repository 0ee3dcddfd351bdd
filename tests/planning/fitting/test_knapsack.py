"""The exact choice within a budget, against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.planning.fitting.knapsack import Option, choose

OPTIONS = st.lists(
    st.builds(Option, st.integers(0, 30).map(float), st.integers(0, 20).map(float)), min_size=1, max_size=4
)


def brute_force(units: list[list[Option]], budget: float) -> float:
    """The least loss within the budget; infinite where nothing is."""
    sums = (
        (sum(option.cost for option in chosen), sum(option.loss for option in chosen))
        for chosen in itertools.product(*units)
    )
    return min((loss for cost, loss in sums if cost <= budget), default=math.inf)


@given(st.lists(OPTIONS, max_size=6), st.integers(-1, 100))
@settings(max_examples=60)
def test_nothing_within_the_budget_is_better(units: list[list[Option]], budget: int) -> None:
    found = choose(units, budget)
    if found is None:
        assert brute_force(units, budget) == math.inf
        return
    chosen = [options[number] for options, number in zip(units, found, strict=True)]
    assert sum(option.cost for option in chosen) <= budget
    assert sum(option.loss for option in chosen) == brute_force(units, budget)
    assert choose(units, budget) == found


def test_what_the_hull_leaves_out_is_chosen_where_it_fits_best() -> None:
    """The middle options are above the line between the others: no price makes them the best."""
    unit = [Option(10.0, 0.0), Option(6.0, 5.0), Option(0.0, 10.0)]
    assert choose([unit, unit], 15) == (1, 2)
    assert choose([unit], 9) == (1,)
    assert choose([unit, unit], 4) == (0, 0)


def test_the_unit_that_suffers_most_gets_the_bits() -> None:
    calm, tender = ([Option(loss, 4.0), Option(0.0, 8.0)] for loss in (1.0, 100.0))
    assert choose([calm, tender, calm], 16) == (0, 1, 0)


def test_many_units_take_little_time() -> None:
    """As many units as a large model has, with losses over six orders of magnitude."""
    random = np.random.default_rng(0)
    units = []
    for _ in range(240):
        size, loss = float(random.integers(1, 5000)), 10 ** random.uniform(-6, 0)
        shares = ((2.0, 0.0), (1.02, 1e-3), (0.5625, 0.9), (0.515, 1.0))
        units.append([Option(loss * part * random.uniform(0.8, 1.2), size * share) for share, part in shares])
    least = sum(min(option.cost for option in options) for options in units)
    most = sum(max(option.cost for option in options) for options in units)
    for part in (0.0, 0.1, 0.5, 0.9):
        budget = least + part * (most - least)
        found = choose(units, budget)
        assert found is not None
        assert sum(options[number].cost for options, number in zip(units, found, strict=True)) <= budget * (
            1 + 1e-12
        )


@pytest.mark.parametrize("budget", [-1, 3])
def test_too_little_is_nothing(budget: float) -> None:
    assert choose([[Option(0.0, 4.0)]], budget) is None
