"""Prompts that begin with pages of the cache, on one GPU and on two, each of which has those of its layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moec import runtime
from moec.runtime import Request, Sequence
from tests.support.cuda_stub import Stub
from tests.support.emulated_divided import on_two
from tests.support.emulated_models import compiled

PAGE = 32
RELATIVE = 1e-3


def run(model: runtime.Model, *prompts: tuple[int, ...], new: int) -> list[Sequence]:
    sequences = [model.engine.add(Request(prompt, new)) for prompt in prompts]
    while model.engine.busy:
        model.engine.step()
    return sequences


def check(model: runtime.Model, tokens: int, new: int) -> None:
    """A conversation of two turns, beside one that begins as it does, has likeliest tokens of what is read whole."""
    question = tuple(np.random.default_rng(0).integers(5, 90, tokens).tolist())
    (first,) = run(model, question, new=new)
    history = (*first.tokens, 9, 8)
    again = run(model, history, (*question, 7), new=4)
    expected = [(len(prompt) - 1) // PAGE * PAGE for prompt in (history, (*question, 7))]
    assert [sequence.reused for sequence in again] == expected
    assert model.stats.prompt_tokens == tokens + len(history) + tokens + 1 - sum(expected)
    for sequence in again:
        logits = model.forward(sequence.tokens)[0][len(sequence.request.prompt) - 1 : -1]
        chosen = logits[np.arange(len(logits)), sequence.new_tokens]
        assert (logits.max(-1) - chosen < RELATIVE * np.abs(logits).max()).all()


def test_on_one(stub: Stub, tmp_path: Path) -> None:
    bundle = compiled(tmp_path, "f32", torch.float32)
    options = {"device": "cuda:0", "cache_tokens": 8 * PAGE, "max_batch": 3, "max_step_tokens": 48}
    with runtime.load(bundle, verify="sizes", prefix_caching=True, **options) as model:  # type: ignore[arg-type]
        check(model, PAGE + 1, 3)


@pytest.mark.slow
def test_on_two(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = on_two(compiled(tmp_path, "f32", torch.float32), "straight", monkeypatch)
    with load(prefix_caching=True, max_step_tokens=48, cache_tokens=8 * PAGE) as model:
        check(model, PAGE + 8, PAGE)
