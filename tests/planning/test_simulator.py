from __future__ import annotations

import numpy as np
import pytest

from moec.artifacts.schedule import Budgets
from moec.planning.costs.prediction import CURVE_SHARES
from moec.planning.planner import plan
from moec.planning.routing.synthetic import SCATTERED, TOPICAL, zipf_traces
from moec.planning.simulator import simulate
from tests.support.tiny_bundle import CPU, GPU, tiny_model, tiny_traces


def test_curves_rise_to_everything_and_stay_below_the_optimum() -> None:
    model = tiny_model()
    result = simulate(tiny_traces(model, tokens=400), model, (CPU, GPU))
    assert result.tokens == 200, "the generated ones"
    assert result.shares == CURVE_SHARES
    assert result.expert_bytes[0] == 0
    for policy in result.policies:
        assert policy.hit_rates[0] == 0
        assert policy.hit_rates[-1] == 1
        assert list(policy.hit_rates) == sorted(policy.hit_rates)
        assert max(policy.of_optimal) <= 1
        assert np.all(np.array(policy.hit_rates) <= np.array(result.optimal) + 1e-12)
    assert [each.machine for each in result.machines] == ["cpu", "gpu"]
    for machine in result.machines:
        assert list(machine.milliseconds) == sorted(machine.milliseconds, reverse=True)
        assert machine.milliseconds[-1] == pytest.approx(machine.optimal_milliseconds[-1])
        assert machine.milliseconds[8] > machine.optimal_milliseconds[8]


def test_guesses_are_told_over_budgets() -> None:
    model = tiny_model()
    result = simulate(tiny_traces(model, tokens=400), model, ())
    assert {each.source for each in result.guesses} == {"transitions", "requests"}
    for guess in result.guesses:
        assert guess.missing[0] == pytest.approx(guess.recall), "without slots everything is missing"
        assert guess.missing[-1] == guess.first_right[-1] == 0
        assert 0 < guess.first_right[0] <= 1


def test_of_independent_tokens_the_best_fixed_set_bounds_every_policy() -> None:
    """Nothing but popularity can be known of them, so Belady's optimum is out of reach for any policy."""
    model = tiny_model(((32, 4, 8), (32, 4, 8)))
    result = simulate(zipf_traces([(32, 4)] * 2, 1600, SCATTERED), model, (GPU,))
    quarter = CURVE_SHARES.index(0.25)
    best = max(policy.hit_rates[quarter] for policy in result.policies)
    assert result.fixed[quarter] - 0.02 < best < result.fixed[quarter] + 0.005
    assert result.fixed[quarter] < 0.93 * result.optimal[quarter]
    assert result.fixed[0] == 0
    assert result.fixed[-1] == 1


def test_the_best_policy_is_the_schedules() -> None:
    model = tiny_model(((32, 4, 8), (32, 4, 8)))
    traces = zipf_traces([(32, 4)] * 2, 400, TOPICAL)
    result = simulate(traces, model, (GPU,))
    schedule = plan(traces, model, Budgets(1 << 22, 1 << 22, 64, 8), GPU)
    assert schedule.policy == result.policies[0].policy
    assert schedule.prediction.policies[0].policy == schedule.policy
    assert len(schedule.prediction.policies) == len(result.policies)
