from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.errors import RequestError
from moec.runtime.engine import Engine, Limits, Request, Sequence
from moec.runtime.engine.scheduler import MIXED_STEP_TOKENS
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.sampling import Sampling
from moec.runtime.stats import Stats
from tests.support.fake_executor import FakeExecutor

VOCAB = 31


def make_engine(batch: int = 4, step: int = 64, pages: int = 64, context: int = 512) -> Engine:
    return Engine(FakeExecutor(pages, VOCAB), Limits(batch, step, context, pages), Vocabulary(VOCAB), Stats())


def finish(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def greedy(prompt: tuple[int, ...], count: int) -> list[int]:
    fake, tokens = FakeExecutor(1, VOCAB), list(prompt)
    for _ in range(count):
        tokens.append(int(fake.logits(tuple(tokens)).argmax()))
    return tokens[len(prompt) :]


def assert_clean(engine: Engine) -> None:
    scheduler = engine.scheduler
    assert scheduler.pages.free == scheduler.pages.total
    assert not scheduler.running
    assert not scheduler.waiting
    assert len(scheduler._rows) == engine.limits.max_batch


requests = st.lists(
    st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=150), st.integers(1, 90)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=40)
@given(requests, st.integers(1, 5), st.integers(1, 40), st.integers(8, 20), st.data())
def test_tokens_do_not_depend_on_the_batch(
    work: list[tuple[list[int], int]], batch: int, extra: int, pages: int, data: st.DataObject
) -> None:
    engine = make_engine(batch, batch + extra, pages)
    sequences: list[Sequence] = []
    for prompt, new in work:
        sequences.append(engine.add(Request(tuple(prompt), new)))
        for _ in range(data.draw(st.integers(0, 3))):
            engine.step()
    finish(engine)
    for sequence, (prompt, new) in zip(sequences, work, strict=True):
        assert sequence.new_tokens == greedy(tuple(prompt), new)
        assert sequence.finished == "length"
    assert_clean(engine)


@settings(max_examples=30)
@given(requests, st.integers(1, 4), st.integers(8, 14))
def test_no_step_exceeds_its_limits_and_the_oldest_always_advances(
    work: list[tuple[list[int], int]], batch: int, pages: int
) -> None:
    engine = make_engine(batch, batch + 7, pages)
    fake = engine._executor
    assert isinstance(fake, FakeExecutor)
    sequences = [engine.add(Request(tuple(prompt), new)) for prompt, new in work]
    while engine.busy:
        oldest = next(sequence for sequence in sequences if sequence.finished is None)
        before = oldest.computed
        engine.step()
        assert oldest.computed > before or oldest.finished is not None
        assert fake.step_tokens[-1] <= batch + 7
        assert len(engine.scheduler.running) <= batch
    assert_clean(engine)


def test_sequences_are_preempted_and_recomputed_when_pages_run_out() -> None:
    engine = make_engine(batch=3, step=128, pages=6)
    prompts = [(1,) * 30, (2,) * 30, (3,) * 30]
    sequences = [engine.add(Request(prompt, 100)) for prompt in prompts]
    finish(engine)
    assert engine.stats.preemptions > 0
    assert [sequence.new_tokens for sequence in sequences] == [greedy(prompt, 100) for prompt in prompts]
    assert engine.stats.generated_tokens == 300


def test_decoding_goes_on_while_a_long_prompt_is_filled() -> None:
    engine = make_engine(batch=2, step=16, pages=64)
    first = engine.add(Request((1, 2), 50))
    engine.step()
    engine.add(Request((3,) * 100, 1))
    before = len(first.new_tokens)
    for _ in range(4):
        assert [output.sequence for output in engine.step()] == [first]
    assert len(first.new_tokens) == before + 4


def test_steps_are_large_only_while_nobody_decodes() -> None:
    engine = make_engine(batch=3, step=4096, pages=400, context=8192)
    fake = engine._executor
    assert isinstance(fake, FakeExecutor)
    first, second = (engine.add(Request((n,) * 2500, 40)) for n in (1, 2))
    engine.step()
    assert (fake.step_tokens[-1], len(first.new_tokens), second.computed) == (4096, 1, 1596)
    engine.step()
    assert (fake.step_tokens[-1], len(first.new_tokens), len(second.new_tokens)) == (905, 2, 1)
    third = engine.add(Request((3,) * 2500, 2))
    for step in range(2):
        engine.step()
        assert fake.step_tokens[-1] == MIXED_STEP_TOKENS
        assert third.computed == (step + 1) * (MIXED_STEP_TOKENS - 2)
        assert (len(first.new_tokens), len(second.new_tokens)) == (3 + step, 2 + step)


def test_a_large_batch_leaves_half_of_a_step_to_prompts() -> None:
    assert Limits(2, 600, 100, 1).mixed_step_tokens == 600
    assert Limits(2, 4096, 100, 1).mixed_step_tokens == MIXED_STEP_TOKENS
    assert Limits(1000, 4096, 100, 1).mixed_step_tokens == 2000


def test_sampled_tokens_do_not_depend_on_the_batch() -> None:
    sampling = Sampling(do_sample=True, temperature=0.8, top_k=7, top_p=0.9, repetition_penalty=1.2)
    request = Request((4, 5, 6), 40, sampling=sampling, seed=3)
    alone, together = make_engine(), make_engine(pages=10)
    expected = alone.add(request)
    finish(alone)
    others = [together.add(Request((n,) * 60, 30, sampling=sampling, seed=n)) for n in range(3)]
    sequence = together.add(request)
    finish(together)
    assert sequence.new_tokens == expected.new_tokens
    assert all(other.finished for other in others)


def test_end_tokens_stop_a_sequence_but_not_before_min_new_tokens() -> None:
    prompt = (1, 2, 3)
    free = greedy(prompt, 30)
    ends = frozenset({free[4]})
    engine = make_engine()
    stopped = engine.add(Request(prompt, 30, eos_token_ids=ends))
    longer = engine.add(Request(prompt, 30, min_new_tokens=12, eos_token_ids=ends))
    finish(engine)
    assert stopped.new_tokens == free[: free.index(free[4]) + 1]
    assert stopped.finished == "stop"
    assert len(longer.new_tokens) >= 12
    assert not ends.intersection(longer.new_tokens[:12])


def test_cancelled_sequences_free_their_pages() -> None:
    engine = make_engine(batch=1)
    running, waiting = engine.add(Request((1,) * 40, 100)), engine.add(Request((2,), 5))
    engine.step()
    engine.cancel(waiting)
    engine.cancel(running)
    engine.cancel(running)
    assert (running.finished, waiting.finished) == ("cancelled", "cancelled")
    assert_clean(engine)
    assert engine.step() == []


def test_score_gives_logits_everywhere_and_leaves_running_sequences_alone() -> None:
    engine = make_engine(step=16)
    sequence = engine.add(Request((1, 2, 3), 20))
    for _ in range(5):
        engine.step()
    tokens = tuple(range(30)) + tuple(range(9))
    logits = engine.score(tokens)
    fake = FakeExecutor(1, VOCAB)
    np.testing.assert_array_equal(logits, [fake.logits(tokens[: n + 1]) for n in range(len(tokens))])
    finish(engine)
    assert sequence.new_tokens == greedy((1, 2, 3), 20)
    assert_clean(engine)


def test_a_cache_page_boundary_is_reached_exactly() -> None:
    engine = make_engine(batch=1, step=8, pages=2, context=2 * PAGE_TOKENS + 1)
    sequence = engine.add(Request((1,) * 10, 2 * PAGE_TOKENS + 1 - 10))
    finish(engine)
    assert sequence.new_tokens == greedy((1,) * 10, 2 * PAGE_TOKENS - 9)
    assert engine.capacity_tokens() == 2 * PAGE_TOKENS + 1


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Request((1,), 0), "max_new_tokens=0"),
        (Request((), 1), "empty"),
        (Request((VOCAB,), 1), f"{VOCAB} is out of range"),
        (Request((1, -1), 1), "-1 is out of range"),
        (Request((1,) * 500, 13), "context of 512"),
        (Request((1,) * 60, 40), "key-value cache"),
    ],
)
def test_requests_that_cannot_run_are_refused(request_: Request, why: str) -> None:
    engine = make_engine(pages=3)
    with pytest.raises(RequestError, match=why):
        engine.add(request_)
    assert not engine.busy


def test_tokens_are_scored_in_parts_between_which_others_step() -> None:
    engine = make_engine(step=16)
    tokens = tuple(np.random.default_rng(3).integers(0, VOCAB, 40).tolist())
    running = engine.add(Request((1, 2, 3), 30))
    engine.step()
    parts = []
    for part in engine.score_tokens(tokens, 2):
        parts.append(part)
        engine.step()
    found = [each for part in parts for each in part]
    assert len(parts) > 2
    assert len(found) == len(tokens) - 1
    logits = engine.score(tokens).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    for place, scored in enumerate(found):
        assert scored.chosen == pytest.approx(logits[place, tokens[place + 1]], abs=1e-5)
        assert [token for token, _ in scored.top] == np.argsort(-logits[place])[:2].tolist()
    left = engine.score_tokens(tokens, 0)
    next(left)
    left.close()
    finish(engine)
    assert running.new_tokens == greedy((1, 2, 3), 30)
    assert_clean(engine)


def test_score_refuses_what_does_not_fit() -> None:
    engine = make_engine(pages=3)
    engine.add(Request((1,) * 40, 5))
    engine.step()
    with pytest.raises(RequestError, match="key-value cache"):
        engine.score((1,) * 64)
    with pytest.raises(RequestError, match="context"):
        engine.score((1,) * 513)


def test_a_step_that_fails_makes_its_sequences_begin_anew() -> None:
    """A state that was advanced cannot be advanced by the same tokens again."""
    engine = make_engine()
    sequence = engine.add(Request((1, 2, 3), 20))
    engine.step()
    fake = engine._executor
    run = fake.next_tokens

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    fake.next_tokens = fail  # type: ignore[assignment,method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert sequence.computed == 0
    fake.next_tokens = run  # type: ignore[method-assign]
    finish(engine)
    assert sequence.new_tokens == greedy((1, 2, 3), 20)


@pytest.mark.parametrize("end", [VOCAB, 2**31, 10**30])
def test_an_end_token_that_the_vocabulary_lacks_never_comes(end: int) -> None:
    engine = make_engine()
    sequence = engine.add(Request((1, 2), 5, min_new_tokens=3, eos_token_ids=frozenset({end})))
    finish(engine)
    assert sequence.new_tokens == greedy((1, 2), 5)
    assert_clean(engine)


@pytest.mark.parametrize(("pages", "width"), [(3, 3), (1000, 512 // PAGE_TOKENS)])
def test_page_tables_are_as_wide_as_a_sequence_can_be(pages: int, width: int) -> None:
    """As its context, or as the cache, whichever is less: kernels go by the width where they know no context."""
    assert make_engine(pages=pages).scheduler.table.array.shape[1] == width
