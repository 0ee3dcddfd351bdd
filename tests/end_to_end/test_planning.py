"""The shipped, trained example: policies, prefetch, recorded routing and MoE-Infinity's way in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moec import runtime
from moec.__main__ import run
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.files.traces import load_traces
from moec.artifacts.schedule import Budgets, Schedule
from moec.planning.machines import common_machines
from moec.planning.planner import plan
from moec.planning.routing.choice import LRU, compare
from moec.planning.routing.replay import Replay, group_layers
from tests.support.woven_traces import woven_traces

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v2"
PROMPT = "And it came to pass"
SMALL = {"max_batch": 1, "max_step_tokens": 64, "cache_tokens": 512}


@pytest.fixture
def bundle(example_bundle: Path) -> Path:
    return example_bundle


def rate(replay: Replay, share: float) -> float:
    return float(np.mean([layer.curve[round(share * layer.experts)] for layer in replay.layers]))


def test_the_policy_on_trained_traces(bundle: Path) -> None:
    """As decision 9 says: 16 experts of which a token takes 4 leave a cache of 8 little to choose."""
    traces = open_bundle(bundle).traces()
    assert traces is not None
    result = compare(group_layers(traces, np.flatnonzero(~traces.prefill)))
    best, lru = result.candidates[0], next(each for each in result.candidates if each.policy == LRU)
    assert best.policy is not None
    assert best.policy.name == "lrfu"
    optimal = result.optimal[best.policy.admission]
    assert rate(best, 0.25) >= 0.9 * rate(optimal, 0.25)
    assert rate(best, 0.5) >= 0.84 * rate(optimal, 0.5)
    for share in (0.1, 0.25, 0.5, 0.75):
        assert rate(best, share) >= rate(lru, share) - 0.01
    assert rate(best, 0.5) > rate(lru, 0.5) + 0.01


def test_woven_into_64_experts_the_policy_is_no_worse_than_lru(bundle: Path) -> None:
    traces = open_bundle(bundle).traces()
    assert traces is not None
    woven = woven_traces(traces, [(64, 6)] * 2, 600)
    result = compare(group_layers(woven, np.arange(600)))
    lru = next(each for each in result.candidates if each.policy == LRU)
    for share in (0.1, 0.25, 0.5, 0.75):
        assert rate(result.candidates[0], share) >= rate(lru, share) - 0.01
    optimal = result.optimal["always"]
    assert rate(result.candidates[0], 0.5) >= 0.9 * rate(optimal, 0.5)


def tight(bundle: Path) -> Schedule:
    """The example on two cores with host memory for a third of its experts."""
    opened = open_bundle(bundle)
    machine = next(each for each in common_machines() if each.gpu_name is None)
    full = plan(None, opened.model, Budgets(0, 1 << 30, 512, 64), machine)
    budget = full.host.total - full.host.experts * 2 // 3
    return plan(opened.traces(), opened.model, Budgets(0, budget, 512, 64), machine)


def test_the_early_router_is_the_best_guess_and_gains(bundle: Path) -> None:
    prefetch = tight(bundle).prefetch
    figures = {each.source: each for each in prefetch.candidates}
    assert set(figures) == {"router", "transitions", "requests"}
    # 4 of 16 at random would be a quarter.
    assert figures["router"].recall > 0.6
    assert 0.3 < figures["transitions"].recall < figures["router"].recall
    assert prefetch.source == "router"
    assert figures["router"].gain_milliseconds > max(0.0, figures["transitions"].gain_milliseconds)
    assert figures["router"].wasted_bytes_per_token < figures["router"].fetched_bytes_per_token
    assert prefetch.bytes_per_layer > 0


def test_prefetching_changes_no_token_and_guesses_as_predicted(bundle: Path) -> None:
    budget = tight(bundle).budgets.host_memory_bytes
    outputs = []
    for prefetch in (False, True):
        with runtime.load(bundle, host_memory=budget, prefetch=prefetch, **SMALL) as model:  # type: ignore[arg-type]
            ids = model.encode(PROMPT)
            outputs.append(model.generate(ids, max_new_tokens=48, seed=3, do_sample=True).tolist())
            stats = model.stats
    assert outputs[0] == outputs[1]
    predicted = {each.source: each.recall for each in tight(bundle).prefetch.candidates}["router"]
    assert stats.prefetch.recall == pytest.approx(predicted, abs=0.1)
    assert 0 < stats.prefetch.exact_match < stats.prefetch.recall
    assert 0 < stats.prefetch.wasted_bytes < stats.prefetch.fetched_bytes <= stats.bytes_moved


def test_what_was_generated_is_recorded_and_planned_with(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.npz"
    with runtime.load(bundle, trace_path=path, trace_capacity=100, **SMALL) as model:  # type: ignore[arg-type]
        ids = model.encode(PROMPT)
        first = model.generate(ids, max_new_tokens=30, seed=1, do_sample=True)
        model.forward(ids)
    traces = load_traces(path)
    tokens = first[0].tolist()
    assert traces.tokens == len(tokens) - 1, "the last token was never run, and forward is no part of it"
    assert traces.prefill.sum() == len(ids)
    with runtime.load(bundle, **SMALL) as model:  # type: ignore[arg-type]
        again = model.trace([tokens[:-1]])
    for one, other in zip(traces.layers, again.layers, strict=True):
        assert (np.sort(one.chosen, axis=1) == np.sort(other.chosen, axis=1)).mean() > 0.97
    with runtime.load(bundle, trace_path=path, trace_capacity=100, **SMALL) as model:  # type: ignore[arg-type]
        model.generate([ids, ids[:3]], max_new_tokens=4, seed=2, do_sample=True)
    assert len(load_traces(path).sequence_starts) == 3
    before = open_bundle(bundle).schedule.profile.tokens
    arguments = ["plan", str(bundle), "--traces", str(path), "--dry-run", "--json"]
    assert run([*arguments, "--host-memory", "22MiB"]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"]["policies"]
    assert open_bundle(bundle).schedule.profile.tokens == before


@pytest.mark.slow
def test_the_readme_of_moe_infinity(tmp_path: Path) -> None:
    """With a tokenizer's tensors; compiling on first use, loading what is there on the second."""
    import torch

    config = {"offload_path": str(tmp_path / "offload"), "device_memory_ratio": 0.75, "num_threads": 1}
    with runtime.MoE(str(EXAMPLE), config) as model:
        input_ids = torch.tensor([model.encode(PROMPT)])
        output_ids = model.generate(input_ids, torch.ones_like(input_ids), max_new_tokens=8, do_sample=False)
    assert output_ids.shape == (1, input_ids.shape[1] + 8)
    made = (tmp_path / "offload" / "tiny-deepseek-v2.moec" / "manifest.json").stat().st_mtime_ns
    with runtime.MoE(str(EXAMPLE), config) as model:
        assert (model.generate(input_ids, max_new_tokens=8, do_sample=False) == output_ids).all()
    assert (tmp_path / "offload" / "tiny-deepseek-v2.moec" / "manifest.json").stat().st_mtime_ns == made
