"""The sampling kernel, in the emulator, against the sampler of the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.artifacts.words import sampling as words
from moec.compiler.kernels.cuda.sample import sample
from moec.runtime.randoms import uniform
from moec.runtime.sampling import Sampler, Sampling, candidates, draw
from moec.runtime.tensors import aligned_empty
from tests.support.cuda_emulator import Emulated

Array = NDArray[Any]
VOCAB, ROWS = 9001, 12


@cache
def emulated(vocab: int) -> Emulated:
    return Emulated(sample(vocab))


def aligned(values: Array, dtype: str) -> Array:
    array = aligned_empty(values.shape, dtype)
    array[...] = values
    return array


def options(
    sampling: Sampling,
    *,
    slot: int = -1,
    seed: int = 0,
    counter: int = 0,
    forbidden: tuple[int, ...] = (),
) -> Array:
    row = np.zeros(words.OPTION_WORDS, np.int32)
    row[words.SLOT], row[words.DO_SAMPLE] = slot, sampling.do_sample
    row[words.FORBIDDEN_COUNT] = len(forbidden)
    row[words.FORBIDDEN : words.FORBIDDEN + len(forbidden)] = forbidden
    row.view(np.float32)[words.TEMPERATURE] = sampling.temperature
    row.view(np.float32)[words.REPETITION_PENALTY] = sampling.repetition_penalty
    row[words.TOP_K] = sampling.top_k
    row.view(np.float64)[words.TAIL // 2] = 1.0 - sampling.top_p
    row.view(np.uint64)[words.SEED // 2], row.view(np.uint64)[words.COUNTER // 2] = seed, counter
    return row


def run(logits: Array, rows: list[Array], seen: Array | None = None) -> list[int]:
    count, vocab = logits.shape
    seen = aligned(np.zeros((1, words.seen_words(vocab))), "int32") if seen is None else seen
    workspace = aligned(np.full(count * words.row_bytes(vocab), 0xA5), "uint8")
    tokens = aligned(np.full(count, -1), "int64")
    emulated(vocab)(
        "sample", aligned(logits, "float32"), aligned(np.stack(rows), "int32"), seen, workspace, tokens
    )
    return [int(token) for token in tokens]


def random_logits(seed: int, scale: float, rows: int = ROWS, vocab: int = VOCAB) -> Array:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * scale).astype(np.float32)


CASES = [
    Sampling(True),
    Sampling(True, temperature=0.7, top_k=50),
    Sampling(True, temperature=1.3, top_p=0.9),
    Sampling(True, temperature=0.9, top_k=300, top_p=0.6),
    Sampling(True, temperature=100.0, top_p=0.5),
    Sampling(True, temperature=0.02, top_k=3000, top_p=0.99),
    Sampling(True, top_k=1),
    Sampling(True, top_p=1e-6),
    Sampling(True, top_k=VOCAB, top_p=0.3),
]


@pytest.mark.parametrize("sampling", CASES, ids=lambda s: f"{s.temperature}-{s.top_k}-{s.top_p}")
def test_draws_are_those_of_the_cpu(sampling: Sampling) -> None:
    logits = random_logits(1, 3.0)
    seeds = [2**63 + 17 * row for row in range(ROWS)]
    actual = run(
        logits, [options(sampling, seed=seed, counter=2**33 + row) for row, seed in enumerate(seeds)]
    )
    for row, seed in enumerate(seeds):
        ids, probabilities = candidates(logits[row], sampling)
        assert actual[row] == ids[draw(probabilities, uniform(seed, 2**33 + row))]


@pytest.mark.parametrize("sampling", CASES[1:6], ids=lambda s: f"{s.temperature}-{s.top_k}-{s.top_p}")
def test_many_equal_logits(sampling: Sampling) -> None:
    logits = np.round(random_logits(2, 1.5))
    actual = run(logits, [options(sampling, seed=5, counter=row) for row in range(ROWS)])
    for row, token in enumerate(actual):
        ids, probabilities = candidates(logits[row], sampling)
        assert token == ids[draw(probabilities, uniform(5, row))]


def test_all_logits_equal() -> None:
    logits = np.zeros((ROWS, VOCAB), np.float32)
    actual = run(logits, [options(Sampling(True, top_p=0.25), seed=6, counter=row) for row in range(ROWS)])
    expected = [
        VOCAB - int(np.ceil(VOCAB * 0.25)) + int(np.ceil(VOCAB * 0.25) * uniform(6, r)) for r in range(ROWS)
    ]
    assert actual == expected


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = random_logits(3, 2.0)
    logits[0, [77, 5000, 8999]] = 50.0
    logits[1, [VOCAB - 1]] = 50.0
    logits[2] = -7.0
    actual = run(logits, [options(Sampling())] * ROWS)
    assert actual == logits.argmax(-1).tolist()
    assert actual[:3] == [77, VOCAB - 1, 0]


@pytest.mark.parametrize("do_sample", [False, True])
def test_penalty_and_forbidden_tokens_over_several_steps(do_sample: bool) -> None:
    sampling = Sampling(do_sample, temperature=0.5, top_k=40, top_p=0.9, repetition_penalty=1.4)
    prompts = [(1, 5, 31, 32, 9000), (8, 64)]
    slots, seeds, forbidden = [2, 0], [3, 4], tuple(range(10, 26))
    samplers = [Sampler(sampling, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    seen = aligned(np.zeros((3, words.seen_words(VOCAB))), "int32")
    for slot, prompt in zip(slots, prompts, strict=True):
        for token in prompt:
            seen.view(np.uint32)[slot, token // 32] |= np.uint32(1 << token % 32)
    logits = random_logits(4, 2.0, rows=2)
    chosen = []
    logits[:, [1, 5, 12, 25, 31, 32, 64, 9000]] = 9.0
    for step in range(6):
        rows = [
            options(sampling, slot=slot, seed=seed, counter=step, forbidden=forbidden)
            for slot, seed in zip(slots, seeds, strict=True)
        ]
        expected = [s.choose(logits[row], frozenset(forbidden)) for row, s in enumerate(samplers)]
        assert run(logits, rows, seen) == expected
        chosen.append(expected[1])
    assert not seen[1].any()
    assert sum(int(word).bit_count() for word in seen.view(np.uint32)[0]) == len({*prompts[1], *chosen})


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = random_logits(7, 2.0, rows=3)
    rows = [options(CASES[3], seed=1), options(Sampling()), options(CASES[2], seed=2)]
    together = run(logits, rows)
    assert together == [run(logits[row : row + 1], [rows[row]])[0] for row in range(3)]


def test_a_large_vocabulary() -> None:
    logits = random_logits(8, 2.5, rows=2, vocab=102_400)
    rows = [options(CASES[0], seed=9), options(CASES[3], seed=9)]
    actual = run(logits, rows)
    for row, sampling in enumerate((CASES[0], CASES[3])):
        ids, probabilities = candidates(logits[row], sampling)
        assert actual[row] == ids[draw(probabilities, uniform(9, 0))]


def test_no_possible_token_is_no_crash() -> None:
    logits = np.full((1, 40), -np.inf, np.float32)
    assert run(logits, [options(Sampling(True, top_k=3, top_p=0.5))]) == [0]
