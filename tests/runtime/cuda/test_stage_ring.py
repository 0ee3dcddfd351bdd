"""The ring of the stage: no two experts whose turns overlap share a byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moec.runtime.devices.cuda.offload.ring import Place, StageRing


def test_places_follow_each_other_and_wait_for_who_was_there() -> None:
    ring = StageRing(30)
    assert [ring.take(10, turn) for turn in (0, 0, 1)] == [Place(0, -1), Place(10, -1), Place(20, -1)]
    assert ring.take(10, 2) == Place(0, 0)
    assert ring.take(10, 2) == Place(10, 0)
    assert ring.take(10, 2) == Place(20, 1)
    assert ring.take(10, 2) is None


def test_what_does_not_fit_gets_no_place() -> None:
    assert StageRing(9).take(10, 0) is None
    ring = StageRing(25)
    assert [ring.take(10, 0), ring.take(10, 0), ring.take(10, 0)] == [Place(0, -1), Place(10, -1), None]


@given(st.integers(1, 100), st.lists(st.lists(st.integers(1, 40), max_size=8), max_size=12))
def test_nothing_is_overwritten_before_its_turn_is_over(size: int, turns: list[list[int]]) -> None:
    ring = StageRing(size)
    held: list[tuple[int, int, int]] = []
    waited = -1
    for turn, sizes in enumerate(turns):
        for wanted in sizes:
            place = ring.take(wanted, turn)
            if place is None:
                continue
            assert 0 <= place.offset <= size - wanted
            assert waited <= place.after < turn
            waited = place.after
            end = place.offset + wanted
            for first, last, owner in held:
                assert owner <= place.after or last <= place.offset or end <= first
            held.append((place.offset, end, turn))
