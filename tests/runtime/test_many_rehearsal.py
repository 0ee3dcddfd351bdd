"""Which calls a load makes to see what experts with many tokens cost the CPU, and what it learns from them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.runtime.sharing import many
from moec.runtime.sharing.many import rehearse_many


class Calls:
    """Each takes 100 microseconds an expert, and 10 more for each of its tokens; twice as long beside a busy link."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[NDArray[np.int64]] = []
        self.busy: list[float] = []
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def prepare(self, index: NDArray[np.int64], link_seconds: float) -> Callable[[], None]:
        self.now += 1e-3
        self.busy.append(link_seconds)

        def run() -> None:
            self.seen.append(index)
            experts = len(np.unique(index[index >= 0]))
            took = 1e-6 * (100 * experts + 10 * np.count_nonzero(index >= 0))
            self.now += 2 * took if link_seconds else took

        return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize(
    ("top_k", "known", "together"),
    [(6, range(64), 12), (2, range(1, 9), 8), (2, range(40), 16), (1, (3,), 1), (4, (7, 9), 2)],
)
def test_experts_with_as_many_tokens_each_are_timed_together(
    calls: Calls, top_k: int, known: Any, together: int
) -> None:
    tokens, cpu_us = rehearse_many(calls.prepare, top_k, list(known), 1024)
    assert tokens == many.TOKENS
    np.testing.assert_allclose(cpu_us, [220, 280, 520, 1480])
    alone = sorted({seconds for seconds in calls.busy if seconds})
    np.testing.assert_allclose(alone, [1.5e-6 * together * us for us in (110, 140, 260, 740)])
    for index in calls.seen:
        experts, counts = np.unique(index[index >= 0], return_counts=True)
        assert set(experts.tolist()) <= set(known)
        assert len(experts) == together
        assert len(set(counts.tolist())) == 1
        assert all(len(set(row[row >= 0])) == np.count_nonzero(row >= 0) for row in index)


def test_small_steps_and_slow_machines_know_less(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rehearse_many(calls.prepare, 2, list(range(8)), 20)[0] == (1, 4)
    assert rehearse_many(calls.prepare, 2, list(range(8)), 15) == ((), ())
    monkeypatch.setattr(many, "MOST_SECONDS", 0.0)
    assert rehearse_many(calls.prepare, 2, list(range(8)), 1024)[0] == (1, 4)
