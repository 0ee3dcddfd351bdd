"""Which experts lie where: what slots are worth, and what fits."""

from __future__ import annotations

import itertools

import numpy as np

from moec.artifacts.layout.experts import layout
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.layout.hosting import Hosted, host_experts, take_prefix
from moec.artifacts.schedule import Budgets
from moec.artifacts.traces import Traces, layer_trace
from moec.planning.planner import plan
from moec.planning.routing.allocate import hull_rates
from tests.support.tiny_bundle import GPU, streaming_bytes, tiny_model


def test_slots_go_where_they_save_most() -> None:
    model = tiny_model(((8, 1, 8), (8, 1, 8)))
    steady = layer_trace(8, np.zeros((40, 1), np.int64))
    changing = layer_trace(8, (np.arange(40) % 8)[:, None])
    traces = Traces((changing, steady), np.array([0], np.int64), np.zeros(40, np.bool_))
    empty = plan(traces, model, Budgets(1 << 20, 1 << 20, 64, 8), GPU)
    stride = layout(model.bodies[0]).stride_bytes
    one = plan(traces, model, Budgets(streaming_bytes(model, empty) - 15 * stride, 1 << 20, 64, 8), GPU)
    assert [layer.slots for layer in one.layers] == [0, 1]


def test_the_hull_looks_over_flat_stretches() -> None:
    assert hull_rates(np.array([10.0, 10.0, 10.0, 4.0, 4.0])).tolist() == [2.0, 2.0, 2.0, 0.0]
    assert hull_rates(np.array([10.0, 5.0, 4.0])).tolist() == [5.0, 1.0]
    assert hull_rates(np.array([1.0])).tolist() == []


def test_host_memory_keeps_room_for_a_tokens_experts() -> None:
    layers = footprint(tiny_model(((4, 2, 8), (4, 2, 8)))).layers
    shares, stride = [[1.0, 0.6, 0.3, 0.1], [0.8, 0.7, 0.3, 0.2]], layers[0].stride_bytes
    # 5 strides hold (2, 3) or (3, 2): each token finds a place for its two in either layer.
    assert host_experts(layers, shares, 5 * stride) == Hosted((3, 2), 0)
    # 3 strides would hold (1, 2): the first layer's second expert would find none, so two strides stay free.
    assert host_experts(layers, shares, 3 * stride) == Hosted((1, 0), 2 * stride)
    assert host_experts(layers, shares, 2 * stride + 1) == Hosted((0, 0), 2 * stride)
    assert host_experts((), (), 0) == Hosted((), 0)


def test_prefixes_nest() -> None:
    layers = footprint(tiny_model(((4, 1, 8), (4, 1, 200)))).layers
    order = [1, 0, 0, 1, 0, 0, 1, 1]
    counts = [take_prefix(order, layers, budget) for budget in range(0, 200_000, 1000)]
    for less, more in itertools.pairwise(counts):
        assert all(a <= b for a, b in zip(less, more, strict=True))
