"""Models whose experts get other parameters than transformers': from checkpoint to tokens, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moec import runtime
from tests.end_to_end.conftest import BundleMaker
from tests.end_to_end.test_models import NEW_TOKENS, PROMPT_TOKENS, RELATIVE, random_ids, relative_error
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
    judge.generation_config.eos_token_id = None
    judge.generation_config.pad_token_id = 0  # in no prompt: others would be taken for padding
    ids = random_ids(judge.config.vocab_size, 1, PROMPT_TOKENS)
    with torch.inference_mode():
        expected = judge.generate(torch.from_numpy(ids), max_new_tokens=NEW_TOKENS, do_sample=False).numpy()
        logits = judge(torch.from_numpy(expected)).logits.numpy()
        single = judge(torch.from_numpy(ids[:, :1])).logits.numpy()
    with runtime.load(bundle, max_step_tokens=48) as model:
        found = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=[])
        np.testing.assert_array_equal(found, expected)
        assert relative_error(model.forward(expected), logits) < RELATIVE
        assert relative_error(model.forward(ids[:, :1]), single) < RELATIVE
