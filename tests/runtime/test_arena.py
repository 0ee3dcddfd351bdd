from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from moec.runtime.chain.arena import ArenaPlan, Lifetime, plan_arena
from moec.runtime.device import ALIGNMENT_BYTES

LIVES = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 12), st.integers(0, 12)).map(
        lambda life: (life[0], min(life[1:]), max(life[1:]))
    ),
    max_size=24,
).map(lambda lives: [Lifetime(number, *life) for number, life in enumerate(lives)])


def overlap(plan: ArenaPlan, left: Lifetime, right: Lifetime) -> bool:
    """Whether two things that live at the same time share a byte."""
    together = left.first <= right.last and right.first <= left.last
    a, b = plan.offsets[left.key], plan.offsets[right.key]
    return together and a < b + right.size_bytes and b < a + left.size_bytes


@settings(max_examples=300)
@given(LIVES)
def test_what_lives_at_the_same_time_never_overlaps(lives: list[Lifetime]) -> None:
    plan = plan_arena(lives)
    assert plan.offsets.keys() == {life.key for life in lives}
    for number, life in enumerate(lives):
        start = plan.offsets[life.key]
        assert start % ALIGNMENT_BYTES == 0
        assert start + life.size_bytes <= plan.size_bytes
        assert not any(overlap(plan, life, other) for other in lives[:number])


@given(LIVES)
def test_the_same_input_gives_the_same_plan(lives: list[Lifetime]) -> None:
    assert plan_arena(lives) == plan_arena(list(lives))


def test_memory_is_used_again() -> None:
    lives = [Lifetime(number, 1000, number, number + 1) for number in range(50)]
    assert plan_arena(lives).size_bytes == 2 * 1024


def test_the_lowest_gap_that_fits_is_taken() -> None:
    lives = [
        Lifetime("low", 512, 0, 1),
        Lifetime("high", 512, 0, 9),
        Lifetime("long", 256, 0, 9),
        Lifetime("fits", 300, 2, 9),
    ]
    assert plan_arena(lives).offsets == {"low": 0, "high": 512, "fits": 0, "long": 1024}


def test_an_empty_arena() -> None:
    assert plan_arena([]).size_bytes == 0
