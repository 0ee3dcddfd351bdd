from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moec.artifacts.layout.footprint import footprint
from moec.artifacts.schedule import Budgets
from moec.planning.costs.token import (
    HELP_US,
    QUANTIZED_LAYER_US,
    SLOTS_US,
    cpu_has_share,
    dense_milliseconds,
    miss_cost,
    token_cost,
)
from moec.planning.planner import plan
from moec.planning.routing.replay import LayerReplay
from tests.support.tiny_bundle import GPU, tiny_model, tiny_traces

LAYER = footprint(tiny_model(((8, 4, 200),))).layers[0]
SIZE = LAYER.expert_bytes / 1e6


def test_a_layer_fetches_its_misses_and_then_reads_all_its_experts() -> None:
    machine = dataclasses.replace(
        GPU,
        gpu_efficiency=0.5,
        link_gb_s=10.0,
        link_efficiency=0.8,
        host_bandwidth_gb_s=8.0,
        host_efficiency=0.5,
    )
    lonely = dataclasses.replace(machine, handshake_us=1e6)
    cost = miss_cost(lonely, LAYER)
    assert cost.cpu_share == (0,) * 5
    assert cost.milliseconds == pytest.approx([4 * SIZE / 128 + misses * SIZE / 8 for misses in range(5)])


def test_the_cpu_computes_while_the_gpu_fetches() -> None:
    machine = dataclasses.replace(
        GPU, link_gb_s=10.0, host_bandwidth_gb_s=100.0, host_efficiency=0.1, handshake_us=0.0
    )
    cost = miss_cost(machine, LAYER)
    assert cost.cpu_share == (0, 0, 1, 1, 2), "the fewest that is fastest"
    assert cost.milliseconds[4] == pytest.approx(2 * SIZE / 10 + 3 * SIZE / 256), (
        "as three misses: never falling"
    )


def test_a_cpu_has_a_share_where_it_is_fast_enough() -> None:
    facts = footprint(tiny_model(((8, 4, 200),)))
    fast = dataclasses.replace(
        GPU, link_gb_s=10.0, host_bandwidth_gb_s=100.0, host_efficiency=0.1, handshake_us=0.0
    )
    assert cpu_has_share(fast, facts)
    assert not cpu_has_share(dataclasses.replace(fast, handshake_us=1e6), facts)
    assert not cpu_has_share(dataclasses.replace(fast, unified_memory=True), facts)


def test_each_layer_costs_time_beside_its_bytes() -> None:
    facts = footprint(tiny_model())
    bare = dense_milliseconds(GPU, facts, on_device=True)
    slow = dense_milliseconds(dataclasses.replace(GPU, layer_us=100.0), facts, on_device=True)
    assert slow == pytest.approx(bare + 2 * 0.1)
    assert dense_milliseconds(GPU, facts, on_device=False) == pytest.approx(
        facts.dense_bytes_per_token / 60e6
    )


def test_a_schedule_without_a_gpu_streams_nothing() -> None:
    model = tiny_model()
    schedule = plan(tiny_traces(model), model, Budgets(0, 1 << 20, 64, 8), GPU)
    assert (schedule.prefill.streamed_from_tokens, schedule.prefill.buffers) == (0, 0)
    assert schedule.prediction.resident_milliseconds <= schedule.prediction.milliseconds_per_token


def test_a_quantized_layer_costs_more_beside_its_bytes() -> None:
    facts = footprint(tiny_model())
    layers = tuple(dataclasses.replace(layer, quantized=True) for layer in facts.layers)
    coded = dataclasses.replace(facts, layers=layers)
    more = dense_milliseconds(GPU, coded, on_device=True) - dense_milliseconds(GPU, facts, on_device=True)
    assert more == pytest.approx(len(layers) * QUANTIZED_LAYER_US / 1000)
    assert dense_milliseconds(GPU, coded, on_device=False) == dense_milliseconds(GPU, facts, on_device=False)


@pytest.mark.parametrize(("handshake_us", "more"), [(1e6, SLOTS_US), (0.0, SLOTS_US + HELP_US)])
def test_a_layer_that_has_slots_costs_more_though_nothing_is_missing(
    handshake_us: float, more: float
) -> None:
    machine = dataclasses.replace(
        GPU, link_gb_s=10.0, host_bandwidth_gb_s=100.0, host_efficiency=0.1, handshake_us=handshake_us
    )
    distances = np.full((20, LAYER.top_k), 3)
    replay = LayerReplay(distances, np.zeros_like(distances), LAYER.experts)
    cost = miss_cost(machine, LAYER)
    whole, part = (token_cost(machine, LAYER, replay, cost, slots, LAYER.experts) for slots in (8, 7))
    assert whole.misses == part.misses == 0
    assert part.milliseconds - whole.milliseconds == pytest.approx(more / 1000)
