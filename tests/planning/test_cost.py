from __future__ import annotations

import dataclasses
import math

import pytest

from moec.artifacts.footprint import footprint
from moec.artifacts.schedule import Budgets
from moec.planning.analysis import analyse
from moec.planning.cost import dense_milliseconds, miss_cost
from moec.planning.planner import plan
from moec.planning.streaming import prefill_plan
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
    assert cost.cpu_share == (0, 1, 1, 2, 2)
    assert cost.milliseconds[4] == pytest.approx(2 * SIZE / 10 + 2 * SIZE / 256)


def test_each_layer_costs_time_beside_its_bytes() -> None:
    facts = footprint(tiny_model())
    bare = dense_milliseconds(GPU, facts, on_device=True)
    slow = dense_milliseconds(dataclasses.replace(GPU, layer_us=100.0), facts, on_device=True)
    assert slow == pytest.approx(bare + 2 * 0.1)
    assert dense_milliseconds(GPU, facts, on_device=False) == pytest.approx(
        facts.dense_bytes_per_token / 60e6
    )


def test_steps_are_streamed_from_where_it_is_faster() -> None:
    model = tiny_model(((64, 2, 200),))
    facts, profile = footprint(model), analyse(None, model).profile
    machine = dataclasses.replace(GPU, link_efficiency=0.8 * 0.92)
    half = prefill_plan(machine, facts, profile, (32,), 4096)
    # Copies are 1 / 0.92 as fast as kernels that read host memory, but bring every expert with what it is aligned by:
    # they pay from where so large a share of the experts is wanted anyway. A token wants each with 1 / 32.
    wanted = 0.92 * facts.layers[0].stride_bytes / facts.layers[0].expert_bytes
    assert half.streamed_from_tokens == math.ceil(math.log(1 - wanted) / math.log(31 / 32))
    assert prefill_plan(machine, facts, profile, (64,), 128).streamed_from_tokens == 129, "nothing to stream"
    link = 32 * facts.layers[0].stride_bytes / 1e6 / (16 * 0.8)
    assert half.milliseconds_per_step > link
    assert prefill_plan(machine, facts, profile, (32,), 8).milliseconds_per_step == pytest.approx(
        link, rel=0.2
    )


def test_a_schedule_without_a_gpu_streams_nothing() -> None:
    model = tiny_model()
    schedule = plan(tiny_traces(model), model, Budgets(0, 1 << 20, 64, 8), GPU)
    assert (schedule.prefill.streamed_from_tokens, schedule.prefill.buffers) == (0, 0)
    assert schedule.prediction.resident_milliseconds <= schedule.prediction.milliseconds_per_token
