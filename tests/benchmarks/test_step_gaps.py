from __future__ import annotations

from benchmarks.step_gaps import busy_and_idle
from benchmarks.support.profiled import Event


def step(start: float) -> list[Event]:
    """Two kernels that overlap, three that choose tokens, and copies."""
    names = ("rows", "linear", "sample_score", "sample_histogram", "sample_pick", "Memcpy DtoH")
    return [Event(start + 10 * number, start + 10 * number + 12, name) for number, name in enumerate(names)]


def test_copies_are_idle_time_and_steps_end_with_the_last_choice() -> None:
    """A step is busy for 52 us; one begins every 75 us."""
    events = [event for number in range(8) for event in step(75.0 * number)]
    assert busy_and_idle(events) == (52.0, 23.0)
