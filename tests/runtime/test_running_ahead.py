"""An executor that begins steps ahead gives the engine the tokens of one that does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.runtime.engine import Engine, Limits, Request, Sequence
from moec.runtime.engine.scheduler import StepPlan
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.sampling import Sampling
from moec.runtime.stats import Stats
from tests.support.fake_executor import FakeExecutor

VOCAB = 31
SAMPLINGS = (
    Sampling(),
    Sampling(do_sample=True, temperature=1.5, top_k=9),
    Sampling(do_sample=True, repetition_penalty=1.3),
    Sampling(repetition_penalty=2.0),
)


def make_engine(ahead: bool, batch: int = 4, step: int = 64, pages: int = 64) -> tuple[Engine, FakeExecutor]:
    executor = FakeExecutor(pages, VOCAB, ahead=ahead)
    return Engine(executor, Limits(batch, step, 512, pages), Vocabulary(VOCAB), Stats()), executor


def finish(engine: Engine) -> list[tuple[int, int]]:
    """Sequence and token of each output, in order."""
    outputs: list[tuple[int, int]] = []
    for _ in range(10_000):
        if not engine.busy:
            return outputs
        outputs += [(output.sequence.id, output.token) for output in engine.step()]
    raise AssertionError("the engine does not come to an end")


def assert_clean(engine: Engine) -> None:
    scheduler = engine.scheduler
    assert scheduler.pages.free == scheduler.pages.total
    assert not scheduler.running
    assert not scheduler.waiting
    assert len(scheduler._rows) == engine.limits.max_batch


requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=80).map(tuple),
    max_new_tokens=st.integers(1, 70),
    min_new_tokens=st.integers(0, 9),
    eos_token_ids=st.frozensets(st.integers(0, VOCAB - 1), max_size=2),
    sampling=st.sampled_from(SAMPLINGS),
    seed=st.integers(0, 5),
)
work = st.lists(st.tuples(requests, st.integers(0, 12)), min_size=1, max_size=8)


@settings(max_examples=60)
@given(work, st.integers(1, 5), st.integers(1, 40), st.integers(6, 20), st.data())
def test_tokens_are_the_same_whoever_comes_goes_and_ends(
    work: list[tuple[Request, int]], batch: int, extra: int, pages: int, data: st.DataObject
) -> None:
    """Requests arrive between steps; some are cancelled, and have the first tokens of what they would have had."""
    engine, _ = make_engine(True, batch, batch + extra, pages)
    sequences: list[Sequence] = []
    cancelled: set[int] = set()
    for request, steps in work:
        sequences.append(engine.add(request))
        for _ in range(steps):
            engine.step()
        if data.draw(st.integers(0, 4)) == 0:
            victim = data.draw(st.sampled_from(sequences))
            engine.cancel(victim)
            cancelled.add(victim.id)
    finish(engine)
    assert_clean(engine)
    for sequence in sequences:
        alone, _ = make_engine(False)
        expected = alone.add(sequence.request)
        finish(alone)
        if sequence.finished == "cancelled":
            assert sequence.id in cancelled
            assert sequence.new_tokens == expected.new_tokens[: len(sequence.new_tokens)]
        else:
            assert (sequence.new_tokens, sequence.finished) == (expected.new_tokens, expected.finished)
            assert sequence.sampler.drawn >= len(sequence.new_tokens)
    assert engine.stats.generated_tokens == sum(len(sequence.new_tokens) for sequence in sequences)


def test_all_but_the_first_step_of_a_sequence_alone_begin_ahead() -> None:
    engine, executor = make_engine(True)
    sequence = engine.add(Request((1, 2, 3), 20))
    assert [token for _, token in finish(engine)] == sequence.new_tokens
    assert executor.begun_ahead == 19
    assert len(executor.step_tokens) == 20


def test_outputs_come_in_the_same_order() -> None:
    found = []
    for ahead in (False, True):
        engine, _ = make_engine(ahead)
        for length, new in ((3, 30), (5, 9), (70, 20)):
            engine.add(Request((7,) * length, new))
        found.append(finish(engine))
    assert found[0] == found[1]


def test_a_token_after_the_end_is_dropped_and_its_page_reused() -> None:
    free, _ = make_engine(False)
    expected = free.add(Request((1, 2), 40))
    finish(free)
    end = expected.new_tokens[8]
    count = expected.new_tokens.index(end) + 1
    engine, executor = make_engine(True, batch=2, pages=4)
    stopped = engine.add(Request((1, 2), 40, eos_token_ids=frozenset({end})))
    other = engine.add(Request((4,) * 30, 40))
    late = engine.add(Request((9,) * 40, 20))
    finish(engine)
    assert (stopped.new_tokens, stopped.finished) == (expected.new_tokens[:count], "stop")
    assert executor.begun_ahead > 0
    for sequence in (other, late):
        alone, _ = make_engine(False)
        same = alone.add(sequence.request)
        finish(alone)
        assert sequence.new_tokens == same.new_tokens
    assert_clean(engine)


def test_a_step_that_nobody_needs_any_more_gives_no_outputs() -> None:
    engine, executor = make_engine(True)
    sequence = engine.add(Request((1, 2), 40))
    for _ in range(3):
        engine.step()
    assert len(executor.step_tokens) == 4
    engine.cancel(sequence)
    assert not engine.busy
    assert engine.step() == []
    assert_clean(engine)
    assert engine.stats.steps == engine.stats.generated_tokens == 3


@pytest.mark.parametrize("waiting", [False, True])
def test_only_one_that_can_join_keeps_steps_from_running_ahead(waiting: bool) -> None:
    engine, executor = make_engine(True, batch=1 if waiting else 2)
    engine.add(Request((1, 2), 40))
    for _ in range(3):
        engine.step()
    begun = executor.begun_ahead
    late = engine.add(Request((3,), 40))
    engine.step()
    engine.step()
    assert (executor.begun_ahead > begun + 1) == waiting
    assert bool(late.new_tokens) != waiting


def test_one_that_runs_and_was_not_in_the_step_is_not_forgotten() -> None:
    engine, _ = make_engine(True)
    for _ in range(2):
        engine.add(Request((1, 2, 3), 9))
    plan = engine.scheduler.schedule()
    follows = engine.scheduler.follow(plan)
    assert follows is not None
    assert [(chunk.start, chunk.count) for chunk in follows.chunks] == [(3, 1)] * 2
    assert engine.scheduler.follow(StepPlan(plan.chunks[:1], ())) is None


def test_sequences_are_preempted_as_without() -> None:
    preemptions, tokens = [], []
    for ahead in (False, True):
        engine, _ = make_engine(ahead, batch=3, step=128, pages=6)
        sequences = [engine.add(Request((n,) * 30, 100)) for n in range(1, 4)]
        finish(engine)
        preemptions.append(engine.stats.preemptions)
        tokens.append([sequence.new_tokens for sequence in sequences])
    assert tokens[0] == tokens[1]
    assert preemptions[0] == preemptions[1] > 0


def test_scores_in_between_change_nothing() -> None:
    engine, executor = make_engine(True)
    sequence = engine.add(Request((1, 2, 3), 30))
    for _ in range(30):
        engine.step()
        engine.score((5, 6, 7))
    alone, _ = make_engine(False)
    expected = alone.add(sequence.request)
    finish(alone)
    assert sequence.new_tokens == expected.new_tokens
    assert executor.begun_ahead > 0


def test_a_wait_that_fails_leaves_the_engine_usable() -> None:
    engine, executor = make_engine(True)
    sequence = engine.add(Request((1, 2, 3), 20))
    begin = executor.next_tokens
    for _ in range(5):
        engine.step()
    failing = [True]

    def once(*arguments: object, **options: object) -> Callable[[], list[int]]:
        read = begin(*arguments, **options)  # type: ignore[arg-type]

        def interrupted() -> list[int]:
            if failing.pop():
                raise KeyboardInterrupt
            return read()

        return interrupted if failing else read

    executor.next_tokens = once  # type: ignore[method-assign]
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    finish(engine)
    alone, _ = make_engine(False)
    expected = alone.add(sequence.request)
    finish(alone)
    assert sequence.new_tokens == expected.new_tokens
