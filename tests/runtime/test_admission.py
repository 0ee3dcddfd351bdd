"""What an engine refuses before anything is run for it, and who joins."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.errors import RequestError
from moec.runtime.engine import Engine, Limits, Request
from moec.runtime.engine.admission import check_request
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.stats import Stats
from tests.support.fake_executor import FakeExecutor

VOCAB = 31


@pytest.mark.parametrize(("new", "most"), [(0, PAGE_TOKENS), (1, PAGE_TOKENS), (2, PAGE_TOKENS - 1)])
def test_the_last_token_enters_the_cache_only_where_none_follows(new: int, most: int) -> None:
    limits, vocabulary = Limits(1, 8, 512, cache_pages=1), Vocabulary(VOCAB)
    check_request(limits, vocabulary, (1,) * most, (), new)
    with pytest.raises(RequestError, match="tokens of key-value cache"):
        check_request(limits, vocabulary, (1,) * (most + 1), (), new)


def test_tokens_that_stand_for_an_image_are_refused() -> None:
    vocabulary = Vocabulary(VOCAB, {"image": 7, "audio": VOCAB + 3})
    engine = Engine(FakeExecutor(4, VOCAB), Limits(1, 8, 64, 4), vocabulary, Stats())
    for prompt, kind in (((1, 7), "image"), ((VOCAB + 3,), "audio")):
        with pytest.raises(RequestError, match=rf"Token id {prompt[-1]} stands for {kind}"):
            engine.add(Request(prompt, 1))
        with pytest.raises(RequestError, match=kind):
            engine.score(prompt)
    engine.add(Request((1, 6), 1))


@pytest.mark.parametrize(("name", "before"), [("_lend", False), ("_release", True)])
@pytest.mark.parametrize("cut", [{1}, {2, 5}])
def test_who_was_about_to_join_to_yield_or_to_leave_when_a_step_was_cut_short_does_so_later(
    monkeypatch: pytest.MonkeyPatch, name: str, before: bool, cut: set[int]
) -> None:
    engine = Engine(FakeExecutor(5, VOCAB), Limits(3, 64, 256, 5), Vocabulary(VOCAB), Stats())
    scheduler, calls = engine.scheduler, 0
    function = getattr(scheduler, name)

    def cut_short(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if before and calls in cut:
            raise KeyboardInterrupt
        function(*arguments)
        if calls in cut:
            raise KeyboardInterrupt

    monkeypatch.setattr(scheduler, name, cut_short)
    sequences = [engine.add(Request((number,) * 20, 60)) for number in range(3)]
    for _ in range(1000):
        if not engine.busy:
            break
        with suppress(KeyboardInterrupt):
            engine.step()
    assert calls > max(cut)
    assert [len(sequence.new_tokens) for sequence in sequences] == [60] * 3
    assert scheduler.pages.free == 5
    assert len(scheduler._rows) == 3
