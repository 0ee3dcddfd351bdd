"""Sequences with a source that an encoder reads: pages of their own, whole in one step, released with the sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import RequestError
from moec.runtime.engine import Engine, Limits, Request, Sequence
from moec.runtime.engine.batch import Piece, StepBatch
from moec.runtime.engine.pages import PageTable
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.stats import Stats
from tests.runtime.test_engine import VOCAB, assert_clean, finish
from tests.support.fake_executor import FakeExecutor

TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60).map(tuple)


def make_engine(batch: int = 3, step: int = 64, pages: int = 12, *, whole: bool = False) -> Engine:
    limits = Limits(batch, step, 512, pages, sources=True, whole_prompts=whole)
    return Engine(FakeExecutor(pages, VOCAB), limits, Vocabulary(VOCAB), Stats())


def greedy(request: Request) -> list[int]:
    fake, tokens = FakeExecutor(1, VOCAB), list(request.prompt)
    while len(tokens) < len(request.prompt) + request.max_new_tokens:
        best = int(fake.logits((*request.source, *tokens)).argmax())
        forced = request.first_token if len(tokens) == 1 else None
        tokens.append(best if forced is None else forced)
    return tokens[len(request.prompt) :]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(TOKENS, TOKENS, st.integers(1, 70)), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(7, 14),
    st.booleans(),
    st.none() | st.integers(0, VOCAB - 1),
)
def test_tokens_do_not_depend_on_the_batch(
    work: list[tuple[tuple[int, ...], tuple[int, ...], int]],
    batch: int,
    pages: int,
    whole: bool,
    first: int | None,
) -> None:
    engine = make_engine(batch, 64, pages, whole=whole)
    requests = [
        Request(prompt, new, source=source, first_token=first, seed=0) for source, prompt, new in work
    ]
    sequences: list[Sequence] = [engine.add(request) for request in requests]
    finish(engine)
    for sequence, request in zip(sequences, requests, strict=True):
        assert sequence.new_tokens == greedy(request)
    assert_clean(engine)


def test_sources_are_read_together_as_far_as_a_step_holds_them() -> None:
    engine = make_engine(step=64, pages=30)
    executor = engine._executor
    assert isinstance(executor, FakeExecutor)
    for length in (30, 20, 15):
        engine.add(Request((1,), 5, source=(2,) * length))
    finish(engine)
    assert executor.encoded == [50, 15]
    assert_clean(engine)


def test_a_cancelled_sequence_gives_the_pages_of_its_source_back() -> None:
    engine = make_engine()
    sequence = engine.add(Request((1,), 30, source=tuple(range(30)) * 2))
    engine.step()
    assert engine.scheduler.pages.free == engine.scheduler.pages.total - 3
    engine.cancel(sequence)
    assert_clean(engine)


def test_scores_leave_running_sequences_alone() -> None:
    engine = make_engine()
    request = Request((1,), 40, source=(3,) * 40)
    sequence = engine.add(request)
    for _ in range(3):
        engine.step()
    logits = engine.score((4, 5, 6), (7, 8))
    np.testing.assert_array_equal(logits[-1], FakeExecutor(1, VOCAB).logits((7, 8, 4, 5, 6)))
    finish(engine)
    assert sequence.new_tokens == greedy(request)
    assert_clean(engine)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((1,), 5), "nothing for the encoder"),
        (Request((1,), 5, source=(1,) * 65), "source has 65 tokens"),
        (Request((1,) * 62, 5, source=(1,)), "prompt has 62 tokens"),
        (Request((1,), 400, source=(1,) * 60), "key-value cache"),
    ],
)
def test_what_does_not_fit_is_refused(request_: Request, message: str) -> None:
    engine = make_engine(whole=True)
    with pytest.raises(RequestError, match=message):
        engine.add(request_)


def test_a_decoder_takes_no_source() -> None:
    engine = Engine(FakeExecutor(4, VOCAB), Limits(1, 8, 64, 4), Vocabulary(VOCAB), Stats())
    with pytest.raises(RequestError, match="no encoder"):
        engine.add(Request((1,), 5, source=(1,)))


def test_last_tokens_are_forced() -> None:
    engine = make_engine()
    sequence = engine.add(Request((1,), 4, source=(2,), first_token=9, last_token=8))
    finish(engine)
    assert sequence.new_tokens[0] == 9
    assert sequence.new_tokens[-1] == 8


def test_calls_begin_with_prompts_and_with_each_token_after_them() -> None:
    batch = StepBatch(16, PageTable(4, 64), sources=True)
    batch.fill([Piece(0, 0, [5, 6, 7, 8], 2, 9, 3), Piece(1, 4, [5], 3, 2, 1)], [3, 4])
    assert batch.each["token_call"][:5].tolist() == [0, 0, 0, 3, 4]
    assert batch.each["token_source"][:5].tolist() == [2, 2, 2, 2, 3]
    assert batch.each["token_last"][:5].tolist() == [8, 8, 8, 8, 1]
