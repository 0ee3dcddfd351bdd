"""Each model type, from checkpoint to tokens, against transformers eager in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import runtime
from moec.compiler.reference import compare, reference_logits, transformers_network
from tests.end_to_end.conftest import BundleMaker
from tests.support.canaries import most_slow
from tests.support.tiny_models import TINY

PROMPT_TOKENS = 40
NEW_TOKENS = 32
RELATIVE = 1e-4


def reference(folder: Path) -> Any:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    model = transformers_network(folder, kind, torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def random_ids(vocab_size: int, *shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(2, vocab_size, shape)


@pytest.mark.parametrize("name", most_slow(TINY))
def test_matches_transformers(name: str, make_bundle: BundleMaker) -> None:
    checkpoint, bundle = make_bundle(name)
    judge = reference(checkpoint)
    ids = random_ids(judge.config.get_text_config().vocab_size, 1, PROMPT_TOKENS)
    with torch.inference_mode():
        expected = judge.generate(torch.from_numpy(ids), max_new_tokens=NEW_TOKENS, do_sample=False).numpy()
        logits = judge(torch.from_numpy(expected)).logits.numpy()
        single = judge(torch.from_numpy(ids[:, :1])).logits.numpy()
    with runtime.load(bundle, max_step_tokens=48) as model:
        found = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=[])
        np.testing.assert_array_equal(found, expected)
        # T larger than a step (and than every window of these models), then T = 1.
        assert relative_error(model.forward(expected), logits) < RELATIVE
        assert relative_error(model.forward(ids[:, :1]), single) < RELATIVE
        # Rows of different lengths do not disturb each other.
        rows = [ids[0].tolist(), ids[0, :7].tolist(), ids[0, 3:20].tolist()]
        together = model.generate(rows, max_new_tokens=8, do_sample=False, eos_token_id=[])
        for row, prompt in enumerate(rows):
            alone = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=[])
            np.testing.assert_array_equal(together[row, -8:], alone[0, -8:])


def relative_error(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Largest difference over the largest logit."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", most_slow(TINY, ("gpt_oss",)))
def test_bfloat16_agrees_with_float32(name: str, make_bundle: BundleMaker) -> None:
    checkpoint, bundle = make_bundle(name, "bf16")
    with runtime.load(bundle) as model:
        vocab = model.record.vocab_size
        sequences = [ids.tolist() for ids in random_ids(vocab, 4, 128, seed=1)]
        measured = (model.forward(ids)[0] for ids in sequences)
        expected = reference_logits(checkpoint, sequences, "float32")
        agreement = compare(sequences, expected, measured)
    assert agreement.tokens == 512
    assert agreement.argmax_agreement >= 0.99
