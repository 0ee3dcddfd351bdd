"""Encoder-decoder models on the emulated GPU: the CPU's logits, and of a quarter of the experts the resident bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import runtime
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.traces import Traces
from moec.runtime.devices.cuda.offload import layer_share
from moec.runtime.devices.cuda.offload.stream_share import StreamShare
from moec.runtime.experts.slots import SlotPlan, state_bytes
from tests.support.cuda_stub import Stub
from tests.support.emulated_models import compiled, nothing_left, planned
from tests.support.tiny_models.encoder_decoders import ENCODER_DECODERS

RANDOM = np.random.default_rng(0)
SOURCES = [RANDOM.integers(3, 140, length).tolist() for length in (70, 9, 33)]
TOKENS = [0, *RANDOM.integers(3, 140, 20).tolist()]
CLOSE = 2e-2
"""Of logits, relative to the largest: queries, keys and weights are rounded to 16 bits."""

pytestmark = pytest.mark.slow


def answers(model: runtime.Model) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": []}
    return {
        "forced": model.generate(SOURCES, forced_bos_token_id=7, **options).tolist(),
        "alone": model.generate(SOURCES[0], **options).tolist(),
        "logits": np.concatenate([model.forward(source, TOKENS) for source in SOURCES]),
        "traces": model.trace(SOURCES),
    }


def same_choices(one: Traces, other: Traces) -> float:
    """Share of the encoder's choices that are the same, over all layers and sources."""
    assert one.encoder is not None
    assert other.encoder is not None
    assert one.encoder.sequence_starts.tolist() == other.encoder.sequence_starts.tolist() == [0, 70, 79]
    layers = zip(one.encoder.layers, other.encoder.layers, strict=True)
    return float(np.mean([np.sort(a.chosen) == np.sort(b.chosen) for a, b in layers]))


@pytest.mark.parametrize("name", list(ENCODER_DECODERS))
def test_resident_and_offloaded(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bundle = compiled(tmp_path, "bf16", torch.bfloat16, name)
    with runtime.load(bundle, verify="sizes") as model:
        expected = answers(model)
    facts: dict[str, Any] = {"device": "cuda:0", "verify": "sizes", "cache_tokens": 512, "max_batch": 3}
    with runtime.load(bundle, max_step_tokens=96, **facts) as model:
        found, plan = answers(model), planned(model)
    largest = np.abs(expected["logits"]).max()
    assert np.quantile(np.abs(found["logits"] - expected["logits"]).max(-1), 0.9) < CLOSE * largest
    assert [row[1] for row in found["forced"]] == [7, 7, 7]
    assert same_choices(found["traces"], expected["traces"]) > 0.95
    needs = footprint(open_bundle(bundle, verify="sizes").model)
    base = plan.total_bytes - plan.needs.expert_bytes - plan.needs.table_bytes + state_bytes(needs.layers)
    quarter = base + needs.experts_bytes // 4
    with runtime.load(bundle, max_step_tokens=96, device_memory=quarter, cpu_threads=0, **facts) as model:
        offloaded = answers(model)
        assert planned(model).slots is not None
        assert model.stats.misses > 0
    assert offloaded["forced"] == found["forced"]
    assert offloaded["alone"] == found["alone"]
    assert same_choices(offloaded["traces"], found["traces"]) == 1
    assert offloaded["logits"].tobytes() == found["logits"].tobytes()
    # Sources as streams, half of whose missing experts are the CPU's.
    monkeypatch.setattr(SlotPlan, "most_entries", property(lambda _: 8))
    monkeypatch.setattr(StreamShare, "takes", lambda *_: True)
    monkeypatch.setattr(layer_share, "cpu_share_of_many", lambda _, tokens: (len(tokens) + 1) // 2)
    with runtime.load(bundle, max_step_tokens=96, device_memory=quarter, cpu_threads=1, **facts) as model:
        shared = answers(model)
        assert 0 < model.stats.cpu_misses < model.stats.misses
    assert shared["forced"] == found["forced"]
    assert same_choices(shared["traces"], found["traces"]) > 0.95
    assert np.quantile(np.abs(shared["logits"] - expected["logits"]).max(-1), 0.9) < CLOSE * largest
    nothing_left(stub)
