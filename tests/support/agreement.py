"""A bundle held against a reference: greedy tokens the same in float32, logits within 1e-4."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moec import runtime
from moec.compiler.reference import transformers_network

PROMPT_TOKENS = 40
NEW_TOKENS = 32
RELATIVE = 1e-4
SHORT_RELATIVE = 4e-4
"""Where activations are rounded to 16 bits: products with quantized weights on a CPU."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What a reference makes of a random prompt."""

    prompt: NDArray[np.int64]
    """``[1, P]``."""
    tokens: NDArray[np.int64]
    """``[1, P + N]``: the prompt and its greedy continuation."""
    logits: NDArray[np.float32]
    """``[1, P + N, V]``."""
    first: NDArray[np.float32]
    """``[1, 1, V]``: of the prompt's first token alone."""


def reference(folder: Path) -> Any:
    """What transformers eager in float32 makes of a checkpoint; it ends and pads nothing."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return endless(transformers_network(folder, kind, torch.float32))


def endless(model: Any) -> Any:
    """No token of ``model`` ends, and none of a random prompt is taken for padding."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def random_ids(vocab_size: int, *shape: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(2, vocab_size, shape)


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference over the largest logit."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def expected_of(judge: Any, new_tokens: int = NEW_TOKENS, *, within: float = RELATIVE) -> Expected:
    """What a model of transformers makes of a prompt of `PROMPT_TOKENS` tokens.

    The first random prompt whose every next token is the same for all logits ``within`` the judge's.
    """
    for seed in range(20):
        prompt = random_ids(judge.config.get_text_config().vocab_size, 1, PROMPT_TOKENS, seed=seed)
        with torch.inference_mode():
            tokens = judge.generate(torch.from_numpy(prompt), max_new_tokens=new_tokens, do_sample=False)
            logits = judge(tokens).logits.numpy()
            first = judge(torch.from_numpy(prompt[:, :1])).logits.numpy()
        if least_lead(logits[:, PROMPT_TOKENS - 1 : -1]) > 2 * within:
            return Expected(prompt, tokens.numpy(), logits, first)
    raise AssertionError("the judge hardly knows which tokens come next")


def least_lead(logits: NDArray[np.float32]) -> float:
    """Of the best token over the next one, over the largest logit; the least of all places."""
    best = np.sort(logits, axis=-1)
    return float((best[..., -1] - best[..., -2]).min() / np.abs(logits).max())


def check_agreement(model: runtime.Model, expected: Expected, *, within: float = RELATIVE) -> None:
    """T larger than a step where ``model`` has steps of less (and than every window), then T = 1."""
    new_tokens = expected.tokens.shape[1] - expected.prompt.shape[1]
    found = model.generate(expected.prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=[])
    np.testing.assert_array_equal(found, expected.tokens)
    assert relative_error(model.forward(expected.tokens), expected.logits) < within
    assert relative_error(model.forward(expected.prompt[:, :1]), expected.first) < within
