from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moec.runtime.sampling import Sampler, Sampling, candidates, penalize

VOCAB = 50


def logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32) * 4


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.floats(0.1, 3.0),
    st.integers(0, 60),
    st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99, 1.0]),
    st.sampled_from([0.5, 1.0, 1.3]),
)
def test_candidates_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    prompt = np.random.default_rng(seed + 1).integers(0, VOCAB, 12)
    ids, scores = torch.from_numpy(prompt)[None], torch.from_numpy(logits(seed))[None]
    scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    scores = TemperatureLogitsWarper(temperature)(ids, scores)
    scores = TopKLogitsWarper(top_k)(ids, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(ids, scores) if top_p < 1 else scores
    expected = torch.softmax(scores[0].double(), -1).numpy()
    seen = np.unique(prompt).tolist()
    kept, probabilities = candidates(
        penalize(logits(seed), seen, penalty), Sampling(True, temperature, top_k, top_p)
    )
    actual = np.zeros(VOCAB)
    actual[kept] = probabilities
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [0.01, 5.0])
def test_a_large_vocabulary_has_the_nucleus_of_transformers(scale: float) -> None:
    scores = np.random.default_rng(3).standard_normal(20_000).astype(np.float32) * scale
    kept, _ = candidates(scores, Sampling(True, top_p=0.8))
    ids = torch.zeros(1, 1, dtype=torch.long)
    expected = torch.isfinite(TopPLogitsWarper(0.8)(ids, torch.from_numpy(scores)[None])[0])
    assert abs(len(kept) - int(expected.sum())) <= 0.001 * len(scores)
    assert expected[torch.from_numpy(kept)].float().mean() > 0.998


def test_greedy_takes_the_best_token_after_the_penalty() -> None:
    scores = np.array([3.0, 2.9, -1.0], np.float32)
    assert Sampler(Sampling(), (0,), None).choose(scores) == 0
    penalised = Sampler(Sampling(repetition_penalty=1.2), (0,), None)
    assert [penalised.choose(scores) for _ in range(2)] == [1, 0]
    assert scores.tolist() == pytest.approx([3.0, 2.9, -1.0])


def test_forbidden_tokens_are_never_chosen() -> None:
    scores = np.array([9.0, 0.0, 0.0], np.float32)
    sampler = Sampler(Sampling(do_sample=True), (1,), 0)
    assert 0 not in {sampler.choose(scores, frozenset({0})) for _ in range(50)}
    assert scores[0] == 9.0


def test_draws_follow_the_probabilities() -> None:
    scores = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    sampler = Sampler(Sampling(do_sample=True), (), 5)
    counts = np.bincount([sampler.choose(scores) for _ in range(4000)], minlength=3)
    np.testing.assert_allclose(counts / 4000, [0.6, 0.3, 0.1], atol=0.04)


def test_equal_seeds_give_equal_draws_and_other_seeds_others() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(do_sample=True, temperature=3.0), (), seed)
        return [sampler.choose(logits(step)) for step in range(30)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)
