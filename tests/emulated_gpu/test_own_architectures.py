"""Grok-1 and Arctic on the emulated GPU, resident and with a quarter of the experts, as the check on a GPU does it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_correctness
from benchmarks.gpu_correctness import WAYS, check
from benchmarks.support.references import computed_reference
from tests.support.cuda_stub import Stub
from tests.support.emulated_models import compiled
from tests.support.references import REFERENCES
from tests.support.references.model import greedy

pytestmark = pytest.mark.slow

TOKENS, PROMPT, NEW = 14, 6, 3


@pytest.mark.parametrize("name", ["grok-1", "arctic"])
def test_logits_are_those_of_the_reference(
    name: str, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_correctness, "DEVICE_MEMORY", "48MiB")
    compiled(tmp_path, "bf16", torch.bfloat16, name).rename(tmp_path / f"{name}.moec")
    judge = REFERENCES[name](tmp_path / "checkpoint")
    ids = np.random.default_rng(4).integers(3, 128, (1, TOKENS))
    logits = judge.logits(ids[0].tolist()).astype(np.float32)[None]
    continued = np.array(greedy(judge, ids[0, :PROMPT], NEW)[PROMPT:], np.int64)
    computed_reference(ids, logits, ids[0, :PROMPT], continued).save(tmp_path / f"{name}.npz")
    rows = check(tmp_path, name, "cuda:0")
    assert len(rows) == len(WAYS)
    for facts in rows:
        assert facts["verdict"] == "ok", facts
        assert facts["greedy tokens equal"] == NEW
