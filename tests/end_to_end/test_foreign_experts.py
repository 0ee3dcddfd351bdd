"""Models whose experts get other parameters than transformers': from checkpoint to tokens, against transformers."""

from __future__ import annotations

import pytest

from moec import runtime
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
