"""The check of a GPU's logits accepts what is right and refuses what is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu_correctness import PASSED, check, common_prefix, verdict
from benchmarks.support.references import load_reference, make_reference, perplexity, position_errors
from tests.support.compiling import compile_checkpoint
from tests.support.tiny_models import save

GOOD: dict[str, Any] = {
    "model": "example",
    "agreement": 0.995,
    "transformers'": 0.985,
    "error at 99 %": 1e-2,
    "of transformers": 5e-2,
    "same bits": True,
    "perplexity": 10.01,
    "perplexity of transformers": 10.0,
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, "ok"),
        ({"agreement": 0.98}, "agreement"),
        ({"agreement": 0.987}, "as transformers"),
        ({"agreement": float("nan")}, "agreement"),
        ({"error at 99 %": 0.06}, "logits"),
        ({"error at 99 %": 0.03}, "as transformers"),
        ({"error at 99 %": 0.03, "same bits": False}, "bits"),
        ({"misses": 0}, "nothing was offloaded"),
        ({"misses": 7}, "ok"),
        ({"of resident": 0.999}, "ok"),
        ({"of resident": 0.99}, "of resident"),
        ({"error at 99 %": float("nan")}, "logits"),
        ({"same bits": False}, "bits"),
        ({"same bits": False, "by the CPU": 3}, "ok"),
        ({"by the CPU": 0}, "nothing was computed by the CPU"),
        ({"perplexity": 10.1}, "perplexity"),
        ({"perplexity": float("nan")}, "perplexity"),
        ({"perplexity": 10.1, "model": "mixtral"}, "ok"),
    ],
)
def test_verdict(change: dict[str, Any], problem: str) -> None:
    assert verdict(GOOD | change) == problem


def test_what_is_not_a_number_is_infinitely_wrong() -> None:
    expected = np.ones((1, 3, 4), np.float32)
    found = expected.copy()
    found[0, 1, 2] = np.nan
    found[0, 2] = 1.1
    np.testing.assert_allclose(position_errors(found, expected), [[0, np.inf, 0.1]], rtol=1e-5)


def test_perplexity_is_that_of_torch() -> None:
    draw = np.random.default_rng(0)
    logits = draw.standard_normal((2, 9, 11)).astype(np.float32)
    ids = draw.integers(0, 11, (2, 9))
    loss = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:, :-1]).reshape(-1, 11), torch.from_numpy(ids[:, 1:]).reshape(-1)
    )
    assert perplexity(ids, logits) == pytest.approx(float(loss.exp()), rel=1e-5)


def test_common_prefix() -> None:
    assert common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4])) == 2
    assert common_prefix(np.array([1, 2, 3]), np.array([1, 2, 3])) == 3


def test_a_bundle_passes_and_another_models_does_not(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "checkpoint", dtype=torch.bfloat16)
    compile_checkpoint(tmp_path / "checkpoint", tmp_path / "mixtral.moec", dtype="bf16")
    ids = np.random.default_rng(2).integers(2, 131, (2, 48))
    make_reference(tmp_path / "checkpoint", ids, "bfloat16").save(tmp_path / "mixtral.npz")
    rows = check(tmp_path, "mixtral", "cpu")
    assert [row["way"] for row in rows] == ["prefill", "decode"]
    for facts in rows:
        assert facts["verdict"] in PASSED, facts
        assert facts["greedy tokens equal"] == 32
    made = load_reference(tmp_path / "mixtral.npz")
    replace(made, logits=np.roll(made.logits, 1, axis=-1)).save(tmp_path / "mixtral.npz")
    assert check(tmp_path, "mixtral", "cpu")[0]["verdict"] == "agreement, logits"
