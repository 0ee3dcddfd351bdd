from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.reference import check_same_model
from moec.errors import CheckpointError
from tests.support.tiny_bundle import tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v2"


def test_a_reference_of_another_model_is_refused_before_anything_is_compared() -> None:
    checkpoint = open_checkpoint(str(EXAMPLE))
    own = replace(tiny_model(), model_type="deepseek_v2", vocab_size=2048, hidden_size=192)
    check_same_model(checkpoint, own)
    for other in (replace(own, model_type="mixtral"), replace(own, vocab_size=2049), tiny_model()):
        with pytest.raises(CheckpointError, match="tiny-deepseek-v2 is of another model than the bundle"):
            check_same_model(checkpoint, other)
