"""Random token ids where there is no text: for calibration, comparison and benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

    from moec.artifacts.model import ModelRecord


def random_tokens(model: ModelRecord, count: int, draw: Random) -> list[int]:
    """``count`` ids of those that a prompt may have: none that stands for what the model is not given."""
    refused = set(model.placeholders.values())
    tokens: list[int] = []
    while len(tokens) < count:
        token = draw.randrange(model.vocab_size)
        if token not in refused:
            tokens.append(token)
    return tokens
