from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.artifacts.files.checks import schedule_problems
from moec.artifacts.files.codec import from_json, to_json
from moec.artifacts.files.records import read_machine
from moec.artifacts.layout.experts import layout
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.model import ModelRecord
from moec.artifacts.schedule import Budgets, ScheduleRecord, best_schedule
from moec.artifacts.traces import Traces
from moec.errors import BudgetError
from moec.planning.costs.token import miss_cost
from moec.planning.planner import plan, plan_analysed, plan_many
from moec.planning.report import memory_report
from moec.planning.routing.analysis import analyse
from tests.support.tiny_bundle import CPU, GPU, streaming_bytes, tiny_model, tiny_traces

if TYPE_CHECKING:
    from moec.artifacts.machine import MachineRecord

MACHINES = [
    read_machine(path) for path in sorted((Path(__file__).parents[2] / "examples/machines").glob("*.json"))
]

layer_shapes = st.tuples(st.integers(1, 12), st.integers(1, 4), st.sampled_from([8, 64, 200])).map(
    lambda shape: (shape[0], min(shape[0], shape[1]), shape[2])
)
models = st.lists(layer_shapes, min_size=1, max_size=4).map(tiny_model)
speeds = st.floats(0.01, 1e5)
gpus = st.builds(
    dataclasses.replace,
    st.just(GPU),
    gpu_memory_bytes=st.integers(1 << 20, 1 << 22),
    gpu_bandwidth_gb_s=speeds,
    link_gb_s=speeds,
    unified_memory=st.booleans(),
    host_bandwidth_gb_s=speeds,
    disk_gb_s=speeds,
    handshake_us=st.floats(0, 1e4),
)
machines = st.one_of(gpus, st.builds(dataclasses.replace, st.just(CPU), host_bandwidth_gb_s=speeds))
extra_bytes = st.one_of(st.integers(0, 1 << 21), st.integers(0, 1 << 17))


def traces_for(model: ModelRecord, seed: int) -> Traces | None:
    return tiny_traces(model, tokens=24, seed=seed) if seed else None


def floor_bytes(model: ModelRecord) -> int:
    """What must lie on either tier, whichever holds the dense weights."""
    facts = footprint(model)
    fixed = facts.dense_bytes + facts.cache_bytes(64) + facts.activation_bytes(8) + facts.table_bytes
    return fixed + 2 * facts.working_set_bytes + 8 * facts.staging_bytes_per_token


@settings(max_examples=80)
@given(model=models, machine=machines, device=extra_bytes, host=extra_bytes, seed=st.integers(0, 5))
def test_budgets_are_kept_to_the_byte_and_schedules_are_consistent(
    model: ModelRecord, machine: MachineRecord, device: int, host: int, seed: int
) -> None:
    traces = traces_for(model, seed)
    device, host = device + floor_bytes(model), host + floor_bytes(model)
    schedule = plan(traces, model, Budgets(device, host, 64, 8), machine)
    strides = {body.name: layout(body).stride_bytes for body in model.bodies}
    for tier, budget, memory in (
        (schedule.device, device, machine.gpu_memory_bytes),
        (schedule.host, host, machine.host_memory_bytes),
    ):
        assert tier.total <= min(budget, memory) or tier.total == 0
    pairs = list(zip(schedule.layers, model.experts, strict=True))
    assert schedule.device.experts == sum(layer.slots * strides[experts.body] for layer, experts in pairs)
    assert schedule.host.experts == sum(
        layer.host_experts * strides[experts.body] for layer, experts in pairs
    )
    for layer, experts in pairs:
        assert 0 <= layer.seeds <= layer.slots <= experts.experts
        assert 0 <= layer.host_experts <= experts.experts
    record = ScheduleRecord(analyse(traces, model).profile, (schedule,))
    assert list(schedule_problems(model, record)) == []
    assert from_json(ScheduleRecord, to_json(record)) == record


@settings(max_examples=80)
@given(
    model=models,
    machine=machines,
    devices=st.tuples(extra_bytes, extra_bytes),
    hosts=st.tuples(extra_bytes, extra_bytes),
    seed=st.integers(0, 5),
)
def test_a_larger_budget_is_never_worse(
    model: ModelRecord, machine: MachineRecord, devices: tuple[int, int], hosts: tuple[int, int], seed: int
) -> None:
    traces = traces_for(model, seed)
    floor = floor_bytes(model)
    budgets = [
        Budgets(floor + device, floor + host, 64, 8)
        for device, host in zip(sorted(devices), sorted(hosts), strict=True)
    ]
    small = plan(traces, model, budgets[0], machine)
    large = plan(traces, model, budgets[1], machine)
    assert large.prediction.hit_rate >= small.prediction.hit_rate
    assert large.prediction.milliseconds_per_token <= small.prediction.milliseconds_per_token
    assert large.prediction.file_bytes_per_token <= small.prediction.file_bytes_per_token
    for less, more in zip(small.layers, large.layers, strict=True):
        assert more.slots >= less.slots
        assert more.host_experts >= less.host_experts


@settings(max_examples=20)
@given(model=models, machine=machines, device=extra_bytes, host=extra_bytes, seed=st.integers(0, 5))
def test_the_same_input_gives_the_same_schedule(
    model: ModelRecord, machine: MachineRecord, device: int, host: int, seed: int
) -> None:
    budgets = Budgets(device + floor_bytes(model), host + floor_bytes(model), 64, 8)
    first = plan(traces_for(model, seed), model, budgets, machine)
    assert first == plan(traces_for(model, seed), model, budgets, machine)


def test_a_plan_in_another_process_is_the_same() -> None:
    code = """import sys
from tests.support.tiny_bundle import *
from moec.planning.planner import plan
model = tiny_model()
print(plan(tiny_traces(model), model, Budgets(1 << 19, 1 << 20, 64, 8), GPU))
print("torch" in sys.modules, "tvm" in sys.modules)
"""
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    assert runs.pop().split()[-2:] == ["False", "False"]


def test_one_byte_less_is_one_expert_less() -> None:
    """And where that is the first that is not there, less what experts stream through."""
    model = tiny_model()
    traces = tiny_traces(model)
    full = plan(traces, model, Budgets(1 << 20, 1 << 20, 64, 8), GPU)
    assert sum(layer.slots for layer in full.layers) == 14
    assert full.prediction.hit_rate == 1.0
    exact = plan(traces, model, Budgets(full.device.total, 1 << 20, 64, 8), GPU)
    assert exact.layers == full.layers
    assert full.device.stream_buffers == 0
    less = plan(traces, model, Budgets(full.device.total - 1, 1 << 20, 64, 8), GPU)
    assert less.device.stream_buffers == 2 * footprint(model).working_set_bytes
    fewer = plan(traces, model, Budgets(less.device.total - 1, 1 << 20, 64, 8), GPU)
    assert sum(layer.slots for layer in fewer.layers) == sum(layer.slots for layer in less.layers) - 1


def test_a_budget_that_is_too_small_says_by_how_much() -> None:
    model = tiny_model()
    facts = footprint(model)
    fixed = (
        facts.dense_bytes
        + facts.cache_bytes(64)
        + facts.activation_bytes(8)
        + facts.table_bytes
        + 2 * facts.working_set_bytes
    )
    assert plan(None, model, Budgets(fixed, 1 << 20, 64, 8), GPU).device.total == fixed
    with pytest.raises(BudgetError, match="device memory budget is 1 bytes too small") as caught:
        plan(None, model, Budgets(fixed - 1, 1 << 20, 64, 8), GPU)
    assert str(fixed) in caught.value.why
    assert "context" in caught.value.do
    with pytest.raises(BudgetError, match="host memory budget"):
        plan(None, model, Budgets(0, 100, 64, 8), CPU)


def test_without_a_gpu_the_most_used_experts_lie_in_host_memory() -> None:
    model = tiny_model()
    traces = tiny_traces(model)
    roomy = plan(traces, model, Budgets(0, 1 << 20, 64, 8), CPU)
    assert roomy.device.total == 0
    assert [layer.host_experts for layer in roomy.layers] == [8, 6]
    assert roomy.prediction.hit_rate == 1.0
    assert roomy.prediction.file_bytes_per_token == 0
    stride = layout(model.bodies[0]).stride_bytes
    tight = plan(traces, model, Budgets(0, roomy.host.total - 5 * stride, 64, 8), CPU)
    assert sum(layer.host_experts for layer in tight.layers) == 9
    shares = {layer.layer: layer.use_share for layer in analyse(traces, model).profile.layers}
    kept = min(shares[layer.layer][layer.host_experts - 1] for layer in tight.layers)
    left = max(
        shares[layer.layer][layer.host_experts]
        for layer in tight.layers
        if layer.host_experts < len(shares[layer.layer])
    )
    assert kept >= left
    assert tight.prediction.milliseconds_per_token > roomy.prediction.milliseconds_per_token
    assert plan(traces, model, Budgets(0, 1 << 20, 64, 8), GPU).device.total == 0


def test_the_cpu_takes_its_share_of_many_misses() -> None:
    facts = footprint(tiny_model(((8, 8, 200),))).layers[0]
    fast_host = dataclasses.replace(GPU, link_gb_s=10.0, host_bandwidth_gb_s=40.0, handshake_us=0.0)
    cost = miss_cost(fast_host, facts)
    assert cost.cpu_share[0] == 0
    assert 1 <= cost.cpu_share[8] < 8
    assert list(cost.milliseconds) == sorted(cost.milliseconds)
    assert cost.milliseconds[8] < 8 * facts.expert_bytes / 10e6
    # Together they cannot draw more than host memory gives.
    assert cost.milliseconds[8] == pytest.approx(8 * facts.expert_bytes / 40e6, rel=0.01)
    slow = dataclasses.replace(fast_host, handshake_us=1e6)
    assert set(miss_cost(slow, facts).cpu_share) == {0}
    assert set(miss_cost(dataclasses.replace(fast_host, unified_memory=True), facts).cpu_share) == {0}


def test_predicted_bytes_add_up() -> None:
    model = tiny_model()
    schedule = plan(tiny_traces(model), model, Budgets(56 << 10, 1 << 20, 64, 8), GPU)
    prediction = schedule.prediction
    chosen = sum(layer.top_k * layout(model.bodies[0]).expert_bytes for layer in model.experts)
    assert 0 < prediction.hit_rate < 1
    parts = prediction.hit_bytes_per_token + prediction.link_bytes_per_token + prediction.cpu_bytes_per_token
    assert parts == pytest.approx(chosen)
    assert prediction.hit_bytes_per_token == pytest.approx(prediction.hit_rate * chosen)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_example_machines_plan(machine: MachineRecord) -> None:
    model = tiny_model()
    budgets = Budgets(machine.gpu_memory_bytes, machine.host_memory_bytes, 128, 16)
    schedule = plan(tiny_traces(model), model, budgets, machine)
    assert schedule.prediction.hit_rate == 1.0
    assert schedule.prediction.milliseconds_per_token > 0


def test_report_has_a_row_for_every_budget() -> None:
    model = tiny_model()
    analysis = analyse(tiny_traces(model), model)
    pairs = [(GPU, Budgets(size, 1 << 20, 64, 8)) for size in (1, 1 << 19, 1 << 20)]
    rows = memory_report(analysis, model, pairs)
    assert "too small" in (rows[0].problem or "")
    assert [row.problem for row in rows[1:]] == [None, None]
    assert rows[1].device_used_bytes <= 1 << 19
    assert rows[2].slots == rows[2].experts == 14
    record = plan_many(tiny_traces(model), model, pairs)
    assert len(record.schedules) == 2


def test_best_schedule_is_the_fastest_that_fits() -> None:
    model = tiny_model()
    analysis = analyse(tiny_traces(model), model)
    cpu = plan_analysed(analysis, model, Budgets(0, 1 << 20, 64, 8), GPU)
    small, large = (
        plan_analysed(analysis, model, Budgets(size, 1 << 20, 64, 8), GPU) for size in (60000, 1 << 20)
    )
    schedules = (cpu, small, large)
    assert best_schedule(schedules, 1 << 20, 1 << 20) is large
    assert best_schedule(schedules, large.device.total - 1, 1 << 20) is small
    assert best_schedule(schedules, 0, 1 << 20) is cpu
    assert best_schedule(schedules, 10, 1 << 20) is None
    assert best_schedule(schedules, 0, 10) is None


def test_the_curve_has_what_schedules_with_these_slots_have() -> None:
    model = tiny_model()
    traces = tiny_traces(model)
    full = plan(traces, model, Budgets(1 << 20, 1 << 20, 64, 8), GPU)
    points = {point.expert_bytes: point for point in full.prediction.curve}
    assert full.prediction.curve[0].hit_rate == 0
    for size in (0, 2, 5, 14):
        held = size * footprint(model).layers[0].stride_bytes
        budget = streaming_bytes(model, full) - full.device.experts + held
        schedule = plan(traces, model, Budgets(budget, 1 << 20, 64, 8), GPU)
        assert schedule.prediction.curve == full.prediction.curve
        if held in points:
            assert points[held].hit_rate == schedule.prediction.hit_rate
            assert points[held].optimal_hit_rate == schedule.prediction.optimal_hit_rate
            assert points[held].milliseconds_per_token == schedule.prediction.milliseconds_per_token
    assert len({point.slots for point in points.values()} & {0, 2, 5, 14}) >= 3
