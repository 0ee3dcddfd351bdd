from __future__ import annotations

import inspect

import numpy as np
import pytest

from benchmarks.support.forced_routing import ForcedSection, drawn_guesses, zipf_choices
from moec.artifacts.layout.footprint import footprint
from moec.runtime.devices.cuda.offload.calls import OffloadedExperts
from moec.runtime.devices.cuda.uploading.weights import ResidentExperts
from tests.support.tiny_bundle import tiny_model


def test_forced_routing_is_called_as_what_it_stands_in_for() -> None:
    """It takes the place of their method, which no type checker sees."""
    own = inspect.signature(ForcedSection._calls)
    assert own == inspect.signature(OffloadedExperts.calls) == inspect.signature(ResidentExperts.calls)


@pytest.mark.parametrize("recall", [0.0, 0.7, 1.0])
def test_guesses_are_drawn_with_the_recall_that_is_asked_for(recall: float) -> None:
    facts = footprint(tiny_model(((16, 4, 8), (16, 4, 8))))
    choices = zipf_choices(facts, 1.0, 200)
    scores = drawn_guesses(facts, choices, recall)
    best = np.argsort(-scores, axis=2)[..., :4]
    right = (best[..., None] == choices[..., None, :]).any(axis=3)
    assert right.mean() == pytest.approx(recall, abs=0.05)
