"""Steps of many tokens: what they take, and from where on they are streamed."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest

from moec.artifacts.layout.footprint import footprint
from moec.artifacts.machine import MachineRecord
from moec.artifacts.model import ModelRecord
from moec.artifacts.sharing import ASKING_US, COPY_US, HANDING_US, MOST_SHARED_TOKENS
from moec.planning.costs.streaming import (
    ATTENTION_SHARE,
    CPU_TOKENS,
    PLAIN_SHARE,
    STEP_LAYERS,
    StepTimes,
    prefill_plan,
)
from moec.planning.costs.work import step_work
from moec.planning.routing.analysis import analyse
from tests.planning.costs.test_work import quantized
from tests.support.tiny_bundle import GPU as HELPED
from tests.support.tiny_bundle import tiny_model

MODEL = tiny_model(((64, 2, 20000),))
FACTS, WORK = footprint(MODEL), step_work(MODEL)
LAYER = FACTS.layers[0]
GPU = dataclasses.replace(HELPED, handshake_us=1e9)
"""A GPU whose CPU computes nothing."""
ENDLESS = dataclasses.replace(GPU, gpu_tflops=1e6, layer_us=0.0)
"""A GPU that multiplies and launches in no time."""


def times(machine: MachineRecord, model: ModelRecord = MODEL) -> StepTimes:
    return StepTimes(machine, footprint(model), step_work(model))


def test_copies_hide_all_that_takes_less() -> None:
    copies = 32 * (LAYER.stride_bytes / 16e6 + COPY_US / 1000)
    assert times(GPU).streamed((32,), 8) == pytest.approx(copies)
    resident = times(GPU).streamed((64,), 4096)
    assert times(dataclasses.replace(GPU, link_gb_s=1e6)).streamed((32,), 4096) == pytest.approx(resident)
    assert resident > 64 * LAYER.expert_bytes / 256e6


def test_everything_resident_by_hand() -> None:
    tokens = 3000
    rows = tokens * (2 * WORK.layers[0].row_bytes + WORK.row_bytes)
    moved = 64 * LAYER.expert_bytes + FACTS.dense_bytes_per_token + rows
    assert times(ENDLESS).streamed((64,), tokens) == pytest.approx(moved / 256e6, rel=1e-3)
    layers = times(dataclasses.replace(ENDLESS, layer_us=100.0)).streamed((64,), tokens)
    assert layers == pytest.approx(moved / 256e6 + STEP_LAYERS * 0.1, rel=1e-3)
    busy = dataclasses.replace(GPU, gpu_tflops=0.01, gpu_bandwidth_gb_s=1e9)
    products = tokens * (WORK.dense.total + 2 * WORK.layers[0].products.total)
    took = products / (1e7 * PLAIN_SHARE) + WORK.attention_operations(tokens) / (1e7 * ATTENTION_SHARE)
    assert times(busy).streamed((64,), tokens) == pytest.approx(took, rel=1e-3)


def test_products_that_read_as_long_as_they_multiply_take_longer_than_either() -> None:
    tokens = 640
    reading = 64 * LAYER.expert_bytes / 256e6
    tflops = 2 * tokens * WORK.layers[0].products.total / reading / 1e9 / PLAIN_SHARE
    alone = times(dataclasses.replace(ENDLESS, gpu_tflops=1e9)).streamed((64,), tokens)
    both = times(dataclasses.replace(ENDLESS, gpu_tflops=tflops)).streamed((64,), tokens)
    assert both - alone == pytest.approx((2**0.5 - 1) * reading, rel=0.05)


def test_more_tokens_take_longer_and_more_slots_do_not() -> None:
    for early, late in pairwise(times(GPU).streamed((64,), tokens) for tokens in (1, 64, 512, 2048, 4096)):
        assert early <= late
    for less, more in pairwise(times(GPU).streamed((slots,), 512) for slots in range(0, 65, 8)):
        assert more <= less


def test_tokens_of_quantized_experts_fill_their_tiles() -> None:
    busy = dataclasses.replace(GPU, gpu_tflops=0.01, gpu_bandwidth_gb_s=1e9)
    model = quantized(MODEL)
    few, whole = (times(busy, model).streamed((64,), tokens) for tokens in (64 * 10, 64 * 64))
    assert few == pytest.approx(whole, rel=0.06), "each expert has 20 or 128 tokens"
    assert times(busy, model).streamed((64,), 64 * 65) > 1.8 * whole


def test_steps_are_streamed_from_where_it_is_faster() -> None:
    profile = analyse(None, MODEL).profile
    machine = dataclasses.replace(ENDLESS, link_efficiency=0.8)
    half = prefill_plan(machine, MODEL, FACTS, profile, (32,), 4096)
    # A stream brings every expert, but the GPU multiplies meanwhile. A token wants each expert with 1 / 32; of those
    # without a slot, a share is fetched by kernels, and of all, as many are read once.
    copies = 32 * (LAYER.stride_bytes / 16e6 + COPY_US / 1000)
    wanted = copies / (32 * LAYER.expert_bytes / (16e6 * 0.8) + 64 * LAYER.expert_bytes / 256e6)
    expected = math.log(1 - wanted) / math.log(31 / 32)
    assert half.streamed_from_tokens == pytest.approx(expected, rel=0.05)
    assert half.milliseconds_per_step >= copies
    assert prefill_plan(machine, MODEL, FACTS, profile, (64,), 128).streamed_from_tokens == 129, (
        "nothing to stream"
    )


def test_the_cpu_computes_a_share_of_missing_experts() -> None:
    """So many that it takes as long as the link with the others, and the GPU's own work comes behind both."""
    machine = dataclasses.replace(HELPED, gpu_tflops=1e6, gpu_bandwidth_gb_s=1e6, layer_us=0.0)
    link, read = 1000 * LAYER.stride_bytes / 16e6 + COPY_US, 1000 * LAYER.stride_bytes / 60e6
    handing = HANDING_US + HELPED.handshake_us
    for tokens in (64, 256, 48 * CPU_TOKENS):
        cpu = read * max(1.0, tokens * 2 / 64 / CPU_TOKENS)
        # What the link does not bring in this time the CPU computes.
        took = 1000 * times(machine).streamed((32,), tokens) - ASKING_US
        assert took / link + (took - handing) / cpu == pytest.approx(32, rel=0.02)
    for alone, tokens in (
        (machine, MOST_SHARED_TOKENS + 1),
        (dataclasses.replace(machine, host_bandwidth_gb_s=8.0), 512),
        (dataclasses.replace(machine, unified_memory=True), 64),
    ):
        assert times(alone).streamed((32,), tokens) == pytest.approx(32 * link / 1000, rel=0.02)


def test_few_tokens_run_from_the_slots_with_the_cpus_help() -> None:
    profile = analyse(None, MODEL).profile
    alone, helped = (times(machine).cached(profile, (32,), 8) for machine in (GPU, HELPED))
    assert helped < 0.5 * alone
    assert times(dataclasses.replace(HELPED, unified_memory=True)).cached(profile, (32,), 8) == alone
