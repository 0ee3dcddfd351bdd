"""Models whose experts get other parameters than transformers': from checkpoint to tokens, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moec import runtime
from moec.artifacts.files.traces import load_traces
from moec.artifacts.traces import repeats
from moec.planning.routing.replay import use_shares
from tests.end_to_end.conftest import BundleMaker
from tests.support.agreement import check_agreement, endless, expected_of
from tests.support.tiny_models import build
from tests.support.tiny_models.foreign import REMADE

CANARY = "dbrx"


@pytest.mark.parametrize(
    "name", [name if name == CANARY else pytest.param(name, marks=pytest.mark.slow) for name in REMADE]
)
def test_matches_transformers(name: str, make_bundle: BundleMaker) -> None:
    _, bundle = make_bundle(name)
    judge = build(name)  # transformers cannot load LongCat-Flash as it is published
    judge.set_attn_implementation("eager")
    expected = expected_of(endless(judge))
    with runtime.load(bundle, max_step_tokens=48) as model:
        check_agreement(model, expected)


@pytest.mark.slow
def test_experts_that_compute_nothing_leave_traces_that_are_read_again(
    make_bundle: BundleMaker, tmp_path: Path
) -> None:
    _, bundle = make_bundle("longcat_flash")
    prompt, path = [(7 * place) % 90 + 3 for place in range(60)], tmp_path / "t.npz"
    with runtime.load(bundle, max_step_tokens=48, trace_path=path) as model:
        model.generate(prompt, max_new_tokens=1)
        expected = model.trace([prompt])
    traces = load_traces(path)
    for found, own, facts in zip(traces.layers, expected.layers, model.record.experts, strict=True):
        np.testing.assert_array_equal(found.chosen, own.chosen)
        assert repeats(found.chosen).any(), "some token chose experts that compute nothing"
        assert use_shares(found.chosen[None], facts.experts).sum() < facts.top_k
