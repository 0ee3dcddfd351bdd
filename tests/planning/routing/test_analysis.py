"""The profile of routing traces."""

from __future__ import annotations

import numpy as np
import pytest

from moec.artifacts.layout.footprint import footprint
from moec.artifacts.schedule import Budgets
from moec.artifacts.traces import Traces, layer_trace
from moec.errors import BundleError
from moec.planning.planner import plan
from moec.planning.routing.analysis import analyse
from tests.support.tiny_bundle import GPU, streaming_bytes, tiny_model, tiny_traces


def test_profile_of_known_traces() -> None:
    model = tiny_model(((4, 1, 8), (3, 1, 8)))
    traces = Traces(
        (layer_trace(4, [[2], [2], [1], [2]]), layer_trace(3, [[0], [1], [2], [1]])),
        np.array([0], np.int64),
        np.zeros(4, np.bool_),
    )
    profile = analyse(traces, model).profile
    assert (profile.provenance, profile.tokens, profile.sequences) == ("traced", 4, 1)
    assert profile.layers[0].order == (2, 1, 0, 3)
    assert profile.layers[0].use_share == (0.75, 0.25, 0.0, 0.0)
    assert profile.layers[0].transitions == ((), (2,), (1, 0), ())
    assert profile.layers[1].transitions == ()


def test_nothing_traced_is_uniform() -> None:
    model = tiny_model()
    analysis = analyse(None, model)
    assert analysis.profile.provenance == "uniform"
    assert analysis.profile.layers[0].use_share == (0.25,) * 8
    everything = streaming_bytes(model, plan(None, model, Budgets(1 << 20, 1 << 20, 64, 8), GPU))
    half = everything - 7 * footprint(model).layers[0].stride_bytes
    schedule = plan(None, model, Budgets(half, 1 << 20, 64, 8), GPU)
    assert 0.3 < schedule.prediction.hit_rate < 0.7


def test_traces_of_another_model_are_refused() -> None:
    with pytest.raises(BundleError, match="another model"):
        analyse(tiny_traces(tiny_model()), tiny_model(((8, 2, 8),)))
