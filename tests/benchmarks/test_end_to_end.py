"""Floors of end-to-end runs, by hand; and transformers' step with a static cache is transformers' own generation."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import torch
import transformers

from benchmarks.decode import rows_of
from benchmarks.prefill import rows_of as prefill_rows
from benchmarks.support.transformers_run import load, make_step
from benchmarks.support.work import Work, WorkType, decode_bytes, distinct_experts
from moec.artifacts.layout.footprint import footprint
from tests.support.tiny_bundle import tiny_model
from tests.support.tiny_models import save

H, V = 16, 24


def test_decode_bytes_by_hand() -> None:
    model = tiny_model(((8, 2, 8), (6, 2, 8)))
    expert = 3 * H * 8 * 4
    dense = V * H * 4 + 2 * H * H * 4
    assert decode_bytes(model, 1) == pytest.approx(dense + 4 * expert)
    more = 8 * (1 - (6 / 8) ** 3) + 6 * (1 - (4 / 6) ** 3)
    assert decode_bytes(model, 3) == pytest.approx(dense + more * expert)


def test_a_large_batch_chooses_every_expert() -> None:
    layer = footprint(tiny_model()).layers[0]
    assert distinct_experts(layer, 1) == pytest.approx(layer.top_k)
    assert distinct_experts(layer, 10_000) == pytest.approx(layer.experts)


def test_work_is_read() -> None:
    assert WorkType().convert("8x512+64", None, None) == Work(8, 512, 64)
    assert str(Work(8, 512, 64)) == "8x512+64"
    with pytest.raises(click.BadParameter):
        WorkType().convert("8*512", None, None)


def test_rows_take_the_fastest_of_theirs() -> None:
    work = Work(1, 512, 64)
    ours = {"runs": [{"work": str(work), "step_seconds": 2e-3, "prefill_seconds": 0.1}]}
    slow = {"work": str(work), "step_seconds": 9e-3, "prefill_seconds": 0.2, "how": "launches"}
    theirs = {"runs": [slow, slow | {"step_seconds": 8e-3, "how": "graph"}]}
    floor, moec, other = rows_of(work, 3e9, 3000.0, ours, theirs)
    assert floor["ms/step"] == pytest.approx(1.0)
    assert (moec["over floor"], moec["aim"]) == (pytest.approx(2.0), 1.25)
    assert (other["ms/step"], other["system"]) == (pytest.approx(8.0), "transformers graph")


def test_rows_of_a_prompt() -> None:
    work = Work(1, 2048, 2)
    ours = {"runs": [{"work": str(work), "prefill_seconds": 0.015, "step_seconds": 1.0}]}
    floor, moec = prefill_rows(work, 8e12, 800.0, ours, {"runs": []})
    assert floor["ms"] == pytest.approx(10.0)
    assert (moec["over floor"], moec["aim"]) == (pytest.approx(1.5), 2.0)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_a_static_cache_step_is_generation(experts: str, tmp_path: Path) -> None:
    save("deepseek_v2_lite", tmp_path, dtype=torch.bfloat16)
    # In 16 bits two ways of adding may choose between tokens that are as good as equal.
    network = load(tmp_path, torch.device("cpu")).float()
    network.set_experts_implementation(experts)
    network.generation_config.eos_token_id = None
    ids = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        cache = transformers.StaticCache(config=network.config, max_cache_len=40)
        output = network(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        found = [token.clone()]
        step = make_step(network, cache, token, 16)
        found += [step().clone() for _ in range(7)]
        expected = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
    assert torch.equal(torch.cat(found, 1), expected[:, 16:])
