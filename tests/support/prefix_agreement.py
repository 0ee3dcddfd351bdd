"""Prompts that begin with pages of the cache, held against a reference that reads them whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moec import runtime
from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.errors import RequestError
from moec.runtime import Request, Sequence
from moec.runtime.logprobs import TokenLogprobs
from tests.support.agreement import RELATIVE, Expected


def check_prefix_caching(bundle: Path, expected: Expected) -> None:
    """Turns of one conversation, some at once, have the tokens and logprobs that ``expected`` has of all of it.

    A model that cannot do it refuses to, or says so where it is left to it.
    """
    tokens: list[int] = expected.tokens[0].tolist()
    prompt = expected.prompt.shape[1]
    with runtime.load(bundle, prefix_caching=None, max_step_tokens=48, verify="sizes") as model:
        if not model.engine.limits.prefix_caching:
            assert "Prefix caching is off" in model.notes[0]
            with pytest.raises(RequestError, match="no prefix caching"):
                runtime.load(bundle, prefix_caching=True, verify="sizes")
            return
        ran = _turns(model, tokens, [prompt])
        ran |= _turns(model, tokens, [len(tokens) - 1, 2 * PAGE_TOKENS + 1, 2 * PAGE_TOKENS])
        assert [sequence.reused for sequence in ran] == [0, 2 * PAGE_TOKENS, 2 * PAGE_TOKENS, PAGE_TOKENS]
        # Traces have the experts of all tokens.
        assert model.trace([tokens]).tokens == len(tokens)
        assert model.stats.reused_tokens == 5 * PAGE_TOKENS
    for sequence, found in ran.items():
        assert sequence.tokens == tokens
        rows = expected.logits[0, len(sequence.request.prompt) - 1 : -1].astype(np.float64)
        chances = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
        chosen = chances[np.arange(len(rows)), sequence.new_tokens]
        near = RELATIVE * np.abs(rows).max()
        np.testing.assert_allclose([each.chosen for each in found], chosen, rtol=0, atol=2 * near)


def _turns(
    model: runtime.Model, tokens: list[int], prompts: list[int]
) -> dict[Sequence, list[TokenLogprobs]]:
    """The logprobs of what follows so many tokens each, up to the end; all run together."""
    engine = model.engine
    ran: dict[Sequence, list[TokenLogprobs]] = {
        engine.add(Request(tuple(tokens[:count]), len(tokens) - count, top_logprobs=0)): []
        for count in prompts
    }
    while engine.busy:
        for output in engine.step():
            assert output.logprobs is not None
            ran[output.sequence].append(output.logprobs)
    return ran
