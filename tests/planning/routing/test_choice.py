from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from moec.artifacts.traces import Traces
from moec.planning.routing.choice import CANDIDATES, JUDGED_SHARES, LRU, Comparison, compare
from moec.planning.routing.replay import Replay, group_layers
from moec.planning.routing.synthetic import (
    SCATTERED,
    SKEWED,
    TOPICAL,
    ZipfRouting,
    overlap,
    zipf_traces,
)
from tests.support.tiny_bundle import tiny_model, tiny_traces
from tests.support.woven_traces import woven_traces

SHAPES = [(64, 6)] * 2


def compared(traces: Traces) -> Comparison:
    return compare(group_layers(traces, np.flatnonzero(~traces.prefill)))


@cache
def compared_on(routing: ZipfRouting) -> Comparison:
    """Takes a second for each."""
    return compared(zipf_traces(SHAPES, 800, routing))


def rate(replay: Replay, share: float) -> float:
    return float(np.mean([layer.curve[round(share * layer.experts)] for layer in replay.layers]))


@pytest.mark.parametrize("routing", [SKEWED, TOPICAL, SCATTERED], ids=["skewed", "topical", "scattered"])
def test_the_chosen_policy_is_near_the_optimum_and_never_below_lru(routing: ZipfRouting) -> None:
    result = compared_on(routing)
    best = result.candidates[0]
    assert best.policy is not None
    lru = next(each for each in result.candidates if each.policy == LRU)
    optimal = result.optimal[best.policy.admission]
    for share in JUDGED_SHARES:
        assert rate(lru, share) - 0.01 <= rate(best, share) <= rate(optimal, share)
    # Without a topic a cache has little to go by but popularity.
    least = 0.9 if routing == TOPICAL else 0.87
    assert rate(best, 0.25) >= least * rate(optimal, 0.25)
    assert rate(best, 0.5) >= 0.9 * rate(optimal, 0.5)


def test_each_kind_of_trace_has_its_policy() -> None:
    found = {
        name: compared_on(routing).candidates[0].policy
        for name, routing in {"skewed": SKEWED, "topical": TOPICAL, "scattered": SCATTERED}.items()
    }
    assert found["scattered"] is not None
    assert found["scattered"].name in ("static", "lfu")
    assert found["topical"] is not None
    assert found["topical"].half_life_tokens in (8, 16)
    assert len(set(found.values())) == 3


def test_what_host_memory_runs_lets_every_expert_in() -> None:
    result = compared(zipf_traces(SHAPES, 400, SKEWED))
    assert result.best(admitting=False).admission == "better"
    assert result.best(admitting=True).admission == "always"


def test_locality_is_what_the_descriptions_say() -> None:
    shares = [overlap(zipf_traces([(64, 6)], 2000, each).layers[0]) for each in (SKEWED, TOPICAL, SCATTERED)]
    assert shares == pytest.approx([0.35, 0.46, 0.27], abs=0.03)


def test_woven_traces_keep_their_locality() -> None:
    source = zipf_traces([(16, 4)] * 5, 600, TOPICAL)
    woven = woven_traces(source, [(64, 6)], 1500)
    assert woven.tokens == 1500
    assert woven.layers[0].experts == 64
    assert np.unique(woven.layers[0].chosen).size > 48
    # Two of six are of a layer whose two heaviest change more often than all four.
    assert overlap(woven.layers[0]) == pytest.approx(overlap(source.layers[0]), abs=0.15)
    with pytest.raises(ValueError, match="cannot be woven"):
        woven_traces(source, [(40, 6)], 100)


def test_the_same_seed_gives_the_same_traces() -> None:
    one, other, third = (zipf_traces([(8, 2)], 50, TOPICAL, seed).layers[0].chosen for seed in (1, 1, 2))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, third)


def test_layers_of_different_shapes_are_all_replayed() -> None:
    model = tiny_model(((8, 2, 8), (6, 1, 8), (8, 2, 8)))
    result = compared(tiny_traces(model, tokens=200))
    for replay in (*result.candidates, *result.optimal.values()):
        assert [layer.experts for layer in replay.layers] == [8, 6, 8]
        assert all(layer.curve[-1] == 1.0 for layer in replay.layers)
    assert {each.policy for each in result.candidates} == set(CANDIDATES)
