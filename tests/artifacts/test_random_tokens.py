from __future__ import annotations

import dataclasses
import random

from moec.artifacts.random_tokens import random_tokens
from tests.support.tiny_bundle import tiny_model


def test_tokens_that_prompts_may_not_have_are_left_out() -> None:
    model = tiny_model()
    size = model.vocab_size
    free = random_tokens(model, 500, random.Random(7))
    draw = random.Random(7)
    assert free == [draw.randrange(size) for _ in range(500)]
    seeing = dataclasses.replace(model, placeholders={"image": free[0], "audio": free[1]})
    refused = {free[0], free[1]}
    tokens = random_tokens(seeing, 400, random.Random(7))
    assert tokens == [token for token in free if token not in refused][:400]
    assert set(tokens) == set(range(size)) - refused
