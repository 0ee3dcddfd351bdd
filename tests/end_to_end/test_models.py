"""Each model type, from checkpoint to tokens, against transformers eager in float32."""

from __future__ import annotations

import numpy as np
import pytest

from moec import runtime
from moec.compiler.reference import compare, reference_logits
from tests.end_to_end.conftest import BundleMaker
from tests.support.agreement import check_agreement, expected_of, random_ids, reference
from tests.support.canaries import most_slow
from tests.support.prefix_agreement import check_prefix_caching
from tests.support.tiny_models import TINY


@pytest.mark.parametrize("name", most_slow(TINY))
def test_matches_transformers(name: str, make_bundle: BundleMaker) -> None:
    checkpoint, bundle = make_bundle(name)
    expected = expected_of(reference(checkpoint))
    ids = expected.prompt
    with runtime.load(bundle, max_step_tokens=48) as model:
        check_agreement(model, expected)
        # Rows of different lengths do not disturb each other.
        rows = [ids[0].tolist(), ids[0, :7].tolist(), ids[0, 3:20].tolist()]
        together = model.generate(rows, max_new_tokens=8, do_sample=False, eos_token_id=[])
        for row, prompt in enumerate(rows):
            alone = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=[])
            np.testing.assert_array_equal(together[row, -8:], alone[0, -8:])
    check_prefix_caching(bundle, expected)


@pytest.mark.parametrize("name", most_slow(TINY, ("gpt_oss",)))
def test_bfloat16_agrees_with_float32(name: str, make_bundle: BundleMaker) -> None:
    checkpoint, bundle = make_bundle(name, "bf16")
    with runtime.load(bundle) as model:
        ids = random_ids(model.record.vocab_size, 4, 128, seed=1)
        ids[np.isin(ids, list(model.record.placeholders.values()))] = 2
        sequences = ids.tolist()
        measured = (model.forward(row)[0] for row in sequences)
        expected = reference_logits(checkpoint, sequences, "float32")
        agreement = compare(sequences, expected, measured)
    assert agreement.tokens == 512
    assert agreement.argmax_agreement >= 0.99
