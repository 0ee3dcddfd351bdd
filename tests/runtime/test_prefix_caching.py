"""Sequences take over the pages that hold their beginning: the same tokens, less to run, and no page lost."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.runtime.engine import Engine, Limits, Request, Sequence
from moec.runtime.engine.batch import StepBatch
from moec.runtime.engine.page_names import PageNames
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.stats import Stats
from tests.runtime.test_engine import VOCAB, assert_clean, finish, greedy
from tests.support.fake_executor import FakeExecutor

CONTEXT = 512


class StepError(Exception):
    """What a step raises that is told to."""


class Watching(FakeExecutor):
    """Writes to no page that others may have taken over; fails where it is told to, after it has written nonsense."""

    def __init__(self, pages: int, *, ahead: bool = False) -> None:
        super().__init__(pages, VOCAB, ahead=ahead)
        self.engine: Engine | None = None
        self.fails = False

    def run(self, batch: StepBatch) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        assert self.engine is not None
        rows, positions = batch.each["token_sequence"][: batch.count], batch.positions[: batch.count]
        written = set(batch.page_table[rows, positions // PAGE_TOKENS].tolist())
        assert not written & set(self.engine.scheduler.pages._names), "a page that others may hold is written"
        if self.fails:
            self.fails = False
            batch.tokens[: batch.count] += 1
            self._write(batch)
            raise StepError
        return super().run(batch)


@dataclass
class Bench:
    engine: Engine
    executor: Watching

    def run(self, prompt: tuple[int, ...], new: int, *, whole: bool = False) -> Sequence:
        sequence = self.engine.add(Request(prompt, new, whole_prompt=whole))
        finish(self.engine)
        return sequence

    def fail(self) -> None:
        """Let the next step fail."""
        self.executor.fails = True
        with pytest.raises(StepError):
            self.engine.step()


def make(batch: int = 4, step: int = 64, pages: int = 64, *, ahead: bool = False, on: bool = True) -> Bench:
    executor = Watching(pages, ahead=ahead)
    limits = Limits(batch, step, CONTEXT, pages, prefix_caching=on)
    executor.engine = Engine(executor, limits, Vocabulary(VOCAB), Stats())
    return Bench(executor.engine, executor)


def prompt_of(tokens: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, tokens).tolist())


def test_a_turn_of_a_conversation_runs_what_is_new() -> None:
    bench = make()
    question = prompt_of(50)
    first = bench.run(question, 60)
    assert first.new_tokens == greedy(question, 60)
    # 109 of the 110 tokens are in the cache, in three full pages and a part.
    history = (*first.tokens, 7, 8, 9)
    bench.executor.step_tokens.clear()
    second = bench.run(history, 20)
    assert second.new_tokens == greedy(history, 20)
    assert (first.reused, second.reused) == (0, 96)
    assert bench.executor.step_tokens == [len(history) - 96] + [1] * 19
    stats = bench.engine.stats
    assert (stats.reused_tokens, stats.prefix_hits) == (96, 1)
    assert stats.prompt_tokens == 50 + len(history) - 96
    assert bench.engine.scheduler.pages.kept == (len(history) + 19) // PAGE_TOKENS
    assert_clean(bench.engine)


@pytest.mark.parametrize(("tokens", "reused"), [(31, 0), (32, 0), (33, 32), (64, 32), (65, 64)])
def test_at_least_one_token_is_run(tokens: int, reused: int) -> None:
    bench = make()
    prompt = prompt_of(tokens)
    for expected in (0, reused):
        sequence = bench.run(prompt, 5)
        assert sequence.new_tokens == greedy(prompt, 5)
        assert sequence.reused == expected


def test_prompts_share_their_common_beginning_alone() -> None:
    bench = make()
    common = prompt_of(64)
    bench.run((*common, *prompt_of(40, 1)), 3)
    other = (*common, *prompt_of(40, 2))
    assert bench.run(other, 9).new_tokens == greedy(other, 9)
    assert bench.engine.stats.reused_tokens == 64
    shifted = (5, *common)
    assert bench.run(shifted, 4).new_tokens == greedy(shifted, 4)
    assert bench.engine.stats.reused_tokens == 64


@pytest.mark.parametrize("ahead", [False, True])
def test_equal_prompts_that_come_at_once_are_run_once(ahead: bool) -> None:
    bench = make(step=100, ahead=ahead)
    prompt = prompt_of(150)
    sequences = [bench.engine.add(Request(prompt, 12)) for _ in range(4)]
    finish(bench.engine)
    assert [sequence.new_tokens for sequence in sequences] == [greedy(prompt, 12)] * 4
    assert [sequence.reused for sequence in sequences] == [0, 128, 128, 128]
    assert bench.engine.stats.prompt_tokens == 150 + 3 * 22
    assert_clean(bench.engine)


def test_whoever_shares_nothing_waits_for_nobody() -> None:
    bench = make(step=200)
    sequences = [bench.engine.add(Request(prompt_of(40, seed), 2)) for seed in range(4)]
    bench.engine.step()
    assert [len(sequence.new_tokens) for sequence in sequences] == [1] * 4


def test_kept_pages_make_room_and_the_budget_holds() -> None:
    bench = make(batch=1, pages=6)
    first, second = prompt_of(100, 1), prompt_of(100, 2)
    bench.run(first, 20)
    assert bench.engine.scheduler.pages.kept == 3
    bench.run(second, 20)
    # Four pages of six were needed: the end of the first sequence had to go.
    assert bench.engine.scheduler.pages.kept == 5
    assert bench.run(first, 5).reused == 64
    assert bench.run(prompt_of(180, 3), 5).reused == 0
    assert bench.engine.scheduler.pages.kept == 5
    assert bench.engine.stats.preemptions == 0
    assert_clean(bench.engine)


def test_a_cancelled_sequence_leaves_what_it_has_computed() -> None:
    bench = make(step=40)
    prompt = prompt_of(100)
    sequence = bench.engine.add(Request(prompt, 5))
    bench.engine.step()
    bench.engine.step()
    assert sequence.computed == 80
    bench.engine.cancel(sequence)
    assert_clean(bench.engine)
    again = bench.run(prompt, 5)
    assert (again.reused, again.new_tokens) == (64, greedy(prompt, 5))


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_failed_step_leaves_nothing_of_its_own(goes_on: bool) -> None:
    bench = make(step=40)
    prompt = prompt_of(100)
    sequence = bench.engine.add(Request(prompt, 5))
    bench.engine.step()
    bench.fail()
    assert sequence.computed == 32
    if goes_on:
        finish(bench.engine)
        assert sequence.new_tokens == greedy(prompt, 5)
    else:
        bench.engine.cancel(sequence)
    again = bench.run(prompt, 5)
    assert again.reused == (96 if goes_on else 32)
    assert again.new_tokens == greedy(prompt, 5)
    assert_clean(bench.engine)


def test_a_sequence_that_lost_its_pages_takes_over_what_is_left_of_them() -> None:
    bench = make(batch=3, step=128, pages=11)
    prompts = [prompt_of(70, seed) for seed in range(3)]
    sequences = [bench.engine.add(Request(prompt, 60)) for prompt in prompts]
    finish(bench.engine)
    stats = bench.engine.stats
    assert stats.preemptions > 0
    assert stats.reused_tokens > 0
    assert [sequence.reused for sequence in sequences] == [0, 0, 0]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.new_tokens == greedy(prompt, 60)
    assert_clean(bench.engine)


def test_a_whole_prompt_is_run_whole_and_off_is_off() -> None:
    prompt = prompt_of(80)
    bench = make()
    bench.run(prompt, 2)
    assert bench.run(prompt, 2, whole=True).reused == 0
    assert bench.run(prompt, 2).reused == 64
    off = make(on=False)
    assert [off.run(prompt, 2).reused for _ in range(2)] == [0, 0]
    assert off.engine.scheduler.pages.kept == off.engine.stats.prefix_hits == 0


def test_scores_are_of_all_positions_and_whoever_joins_waits_for_their_pages() -> None:
    bench = make(step=16, pages=5)
    prompt = prompt_of(60)
    bench.run(prompt, 20)
    fake = FakeExecutor(1, VOCAB)
    parts = bench.engine.score_tokens(prompt_of(150, 1), 0)
    next(parts)
    sequence = bench.engine.add(Request(prompt, 20))
    for _ in range(3):
        assert bench.engine.step() == []
    parts.close()
    finish(bench.engine)
    assert sequence.new_tokens == greedy(prompt, 20)
    logits = bench.engine.score(prompt)
    np.testing.assert_array_equal(logits[-1], fake.logits(prompt))
    assert_clean(bench.engine)


def test_names_are_of_all_tokens_before() -> None:
    one, two = [1] * 64, [2] * 32 + [1] * 32
    names = [PageNames(tokens).first(2) for tokens in (one, two, [*one, 9])]
    assert names[0] == names[2]
    assert not set(names[0]) & set(names[1])
    assert len(set(names[0])) == 2


BEGINNINGS = [prompt_of(length, seed) for length, seed in ((30, 1), (64, 2), (97, 3))]

requests = st.builds(
    lambda first, rest, new, ends: Request((*first, *rest), new, eos_token_ids=frozenset(ends)),
    st.sampled_from(BEGINNINGS),
    st.lists(st.integers(0, 1), max_size=40),
    st.integers(1, 60),
    st.lists(st.integers(0, VOCAB - 1), max_size=2),
)


def until_it_ends(prompt: tuple[int, ...], new: int, ends: frozenset[int]) -> list[int]:
    tokens = greedy(prompt, new)
    stops = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: stops[0] + 1] if stops else tokens


@settings(max_examples=60)
@given(
    st.lists(st.tuples(requests, st.integers(0, 9), st.sampled_from("......cf")), min_size=1, max_size=10),
    st.integers(1, 4),
    st.integers(1, 60),
    st.integers(8, 20),
    st.booleans(),
)
def test_tokens_are_those_without_it_whatever_happens(
    work: list[tuple[Request, int, str]], batch: int, extra: int, pages: int, ahead: bool
) -> None:
    """Sequences come, are cancelled, and fail; turns of one conversation follow each other."""
    bench = make(batch, batch + extra, pages, ahead=ahead)
    engine, sequences = bench.engine, list[Sequence]()
    for request, steps, event in work:
        sequences.append(engine.add(request))
        for _ in range(steps):
            engine.step()
        if event == "c":
            engine.cancel(sequences[len(sequences) // 2])
        if event == "f":
            bench.executor.fails = True
            # What is left may have been begun already, and does not fail.
            with suppress(StepError):
                finish(engine)
            bench.executor.fails = False
    finish(engine)
    for sequence in sequences:
        if len(sequence.tokens) < 150:
            sequences.append(engine.add(Request(tuple(sequence.tokens), 2)))
        if len(sequences) == 2 * len(work):
            break
    finish(engine)
    for sequence in sequences:
        request = sequence.request
        expected = until_it_ends(request.prompt, request.max_new_tokens, request.eos_token_ids)
        assert sequence.new_tokens == expected[: len(sequence.new_tokens)]
        assert sequence.finished == "cancelled" or sequence.new_tokens == expected
    assert_clean(engine)
