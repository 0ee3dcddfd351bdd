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


@settings(max_examples=60)
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


def test_generated_tokens_cost_their_presence_and_their_number() -> None:
    scores = np.zeros(VOCAB, np.float32)
    scores[:3] = 3.0, 2.0, 1.5
    left = dict(enumerate(scores[:3].tolist()))
    sampler = Sampler(Sampling(presence_penalty=0.25, frequency_penalty=0.5), (0, 0, 1, 2), None)
    counts = dict.fromkeys(left, 0)
    for _ in range(8):
        costs = {token: left[token] - 0.25 * (counts[token] > 0) - 0.5 * counts[token] for token in left}
        expected = max(costs, key=lambda token: costs[token])
        assert sampler.choose(scores) == expected
        counts[expected] += 1


def test_biases_are_added_before_everything_else() -> None:
    scores = np.array([1.0, 2.0, 3.0], np.float32)
    assert Sampler(Sampling(logit_bias=((0, 2.5),)), (), None).choose(scores) == 0
    assert Sampler(Sampling(logit_bias=((2, -100.0), (1, -100.0))), (), None).choose(scores) == 0
    biased = Sampling(logit_bias=((0, 2.5),), repetition_penalty=2.0)
    assert Sampler(biased, (0,), None).choose(scores) == 2
    assert scores.tolist() == [1.0, 2.0, 3.0]


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, VOCAB + 5))
def test_logprobs_are_torchs_of_the_models_own_logits(seed: int, top: int) -> None:
    scores = np.round(logits(seed), 1)
    sampler = Sampler(Sampling(logit_bias=((7, 50.0),), repetition_penalty=1.5), (1, 2), None, top)
    token = sampler.choose(scores)
    assert token == 7
    assert sampler.needs_logits
    found = sampler.logprobs
    assert found is not None
    expected = torch.log_softmax(torch.from_numpy(scores).double(), -1)
    assert found.chosen == pytest.approx(float(expected[7]), abs=1e-5)
    values, places = expected.sort(descending=True, stable=True)
    assert [token for token, _ in found.top] == places[:top].tolist()
    assert [value for _, value in found.top] == pytest.approx(values[:top].tolist(), abs=1e-5)


def test_what_the_device_can_choose_needs_no_logits() -> None:
    for sampling in (Sampling(), Sampling(True, 0.5, 3, 0.9, 1.2)):
        sampler = Sampler(sampling, (1,), 0)
        sampler.choose(logits(0))
        assert not sampler.needs_logits
        assert sampler.logprobs is None
