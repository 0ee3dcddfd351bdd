"""Models that transformers does not have, from checkpoint to tokens, against numpy written from their descriptions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moec import runtime
from tests.end_to_end.conftest import BundleMaker
from tests.support.agreement import PROMPT_TOKENS, RELATIVE, Expected, check_agreement, random_ids
from tests.support.references import REFERENCES
from tests.support.references.arctic import Arctic
from tests.support.references.grok import Grok
from tests.support.references.model import ReferenceModel, greedy
from tests.support.tiny_models import save
from tests.support.tiny_models.own import OWN

NEW_TOKENS = 16
CANARY = "grok-1"


@pytest.mark.parametrize(
    "name", [name if name == CANARY else pytest.param(name, marks=pytest.mark.slow) for name in OWN]
)
def test_matches_the_published_architecture(name: str, make_bundle: BundleMaker) -> None:
    checkpoint, bundle = make_bundle(name)
    judge = REFERENCES[name](checkpoint)
    vocab = OWN[name][0]["vocab_size"]
    ids = random_ids(vocab, 1, PROMPT_TOKENS)
    tokens = np.array([greedy(judge, ids[0], NEW_TOKENS)])
    logits = judge.logits(tokens[0]).astype(np.float32)[None]
    with runtime.load(bundle, max_step_tokens=24) as model:
        check_agreement(model, Expected(ids, tokens, logits, logits[:, :1]))
        rows = [ids[0].tolist(), ids[0, :7].tolist(), ids[0, 3:20].tolist()]
        together = model.generate(rows, max_new_tokens=8, do_sample=False, eos_token_id=[])
        for row, prompt in enumerate(rows):
            assert together[row, -8:].tolist() == greedy(judge, prompt, 8)[-8:]


def test_references_would_notice(tmp_path: Path) -> None:
    """What sets these models apart from Mixtral shows in the logits of the tiny ones."""
    grok, arctic = save("grok-1", tmp_path / "grok"), save("arctic", tmp_path / "arctic")
    others: list[tuple[ReferenceModel, ReferenceModel]] = [
        (Grok(grok), Grok(grok, cap=0.0)),
        (Grok(grok), Grok(grok, exact_gelu=True)),
        (Arctic(arctic), Arctic(arctic, late=True)),
    ]
    tokens = random_ids(128, 20).tolist()
    for right, wrong in others:
        logits = right.logits(tokens)
        assert np.abs(logits - wrong.logits(tokens)).max() > 2 * RELATIVE * np.abs(logits).max()
