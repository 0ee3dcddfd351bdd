from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.artifacts.sharing import (
    ManySpeeds,
    ShareSpeeds,
    TeamSpeed,
    cpu_share_of_many,
    cpu_shares,
    is_steady,
    never_falling,
    worth_asking,
    worth_uses,
)


def test_shares_of_an_h100_and_fifteen_cores() -> None:
    """350 microseconds an expert over the link, 185 on the CPU and 165 for each more, as they were measured."""
    speeds = ShareSpeeds(350.0, (0.0, 185.0, 350.0, 515.0, 680.0, 845.0, 1010.0), 8.0)
    assert cpu_shares(speeds, 6) == (0, 1, 1, 2, 3, 4, 4)
    assert speeds.of(3, 2) == 358.0
    assert speeds.of(6, 0) == 2100.0


def test_a_slow_cpu_and_a_slow_handshake_get_nothing() -> None:
    assert cpu_shares(ShareSpeeds(10.0, (0.0, 1000.0), 5.0), 8) == (0,) * 9
    assert cpu_shares(ShareSpeeds(10.0, (0.0, 1.0), 500.0), 8) == (0,) * 9


def test_more_experts_than_were_measured_cost_what_the_last_did() -> None:
    speeds = ShareSpeeds(1.0, (0.0, 10.0, 14.0), 2.0)
    assert [speeds.on_cpu(count) for count in range(5)] == [0.0, 12.0, 16.0, 20.0, 24.0]


def test_a_slot_is_worth_more_uses_where_the_link_is_slower() -> None:
    assert worth_uses(ShareSpeeds(100.0, (0.0, 92.0), 8.0)) == 1.5, "as fast as the CPU"
    assert worth_uses(ShareSpeeds(50.0, (0.0, 92.0), 8.0)) == 1.5
    assert worth_uses(ShareSpeeds(500.0, (0.0, 92.0), 8.0)) == 3.5, "what is lost is won back in four uses"


times = st.floats(0.1, 1e5)


@given(link=times, first=times, more=st.lists(times, max_size=8), handshake=st.floats(0, 100))
def test_no_split_is_faster(link: float, first: float, more: list[float], handshake: float) -> None:
    cpu = [0.0, first]
    for each in more:
        cpu.append(cpu[-1] + each)
    speeds = ShareSpeeds(link, tuple(cpu), handshake)
    shares = cpu_shares(speeds, 12)
    for misses, share in enumerate(shares):
        assert 0 <= share <= misses
        best = min(speeds.of(misses, other) for other in range(misses + 1))
        assert speeds.of(misses, share) == best
        assert speeds.of(misses, share) <= misses * link


@pytest.mark.parametrize(
    ("samples", "expected"), [((0, 3, 2, 5), (0, 3, 3, 5)), ((), ()), ((0, 1, 2), (0, 1, 2))]
)
def test_noise_is_cleared(samples: tuple[float, ...], expected: tuple[float, ...]) -> None:
    assert never_falling(samples) == expected


def test_a_team_is_a_line_through_its_times() -> None:
    """17 MB an expert: 20 microseconds to start, and 165 for each."""
    speed = TeamSpeed.of([0.0, *(20.0 + 165.0 * k for k in range(1, 7))], 17_000_000)
    assert speed is not None
    assert speed.start_us == pytest.approx(20.0)
    assert speed.gb_s == pytest.approx(17_000 / 165)


@pytest.mark.parametrize(
    ("times_us", "start", "each"),
    [((0.0, 100.0), 0.0, 100.0), ((0.0, 90.0, 200.0), 0.0, 96.7), ((0.0, 100.0, 101.0), 50.2, 33.5)],
)
def test_a_team_of_few_or_noisy_times(times_us: tuple[float, ...], start: float, each: float) -> None:
    speed = TeamSpeed.of(times_us, 1_000_000)
    assert speed is not None
    assert speed.start_us == pytest.approx(start, abs=0.1)
    assert 1_000 / speed.gb_s == pytest.approx(each, abs=0.1)


def test_without_experts_there_is_no_team() -> None:
    assert TeamSpeed.of((0.0,), 1) is None


def test_times_of_many_tokens_lie_on_lines() -> None:
    speeds = ManySpeeds(300.0, (1, 4, 16), (150.0, 180.0, 300.0), 100.0)
    np.testing.assert_allclose(speeds.on_cpu([0, 1, 2, 4, 10, 16, 36]), [150, 150, 160, 180, 240, 300, 500])
    np.testing.assert_allclose(speeds.times([1, 4, 16]), [900, 600, 430, 730])
    assert cpu_share_of_many(speeds, [1, 4, 16]) == 2
    assert cpu_share_of_many(speeds, []) == 0
    assert cpu_share_of_many(speeds, [100_000]) == 0


@given(
    link=times,
    cpu=st.lists(times, min_size=2, max_size=4),
    handing=st.floats(0, 1000),
    tokens=st.lists(st.integers(0, 99), max_size=7),
)
def test_no_division_of_experts_with_many_tokens_is_faster(
    link: float, cpu: list[float], handing: float, tokens: list[int]
) -> None:
    speeds = ManySpeeds(link, (1, 4, 16, 64)[: len(cpu)], tuple(sorted(cpu)), handing)

    def until_done(on_cpu: tuple[int, ...]) -> float:
        cost = sum(float(speeds.on_cpu(each)) for each in on_cpu) + (handing if on_cpu else 0)
        return max(cost, link * (len(tokens) - len(on_cpu)))

    share = cpu_share_of_many(speeds, sorted(tokens))
    best = min(until_done(each) for count in range(len(tokens) + 1) for each in combinations(tokens, count))
    assert until_done(tuple(sorted(tokens)[:share])) == pytest.approx(best)


TOKENS = (1, 4, 16, 64)
BF16 = (357.0, [(188, 200, 445, 1470), (270, 274, 664, 1638), (240, 383, 913, 3161)])
INT4 = (113.0, [(98, 159, 323, 759), (123, 183, 371, 1079), (113, 258, 466, 1414)])


@pytest.mark.parametrize(
    ("measured", "tokens", "gains"),
    [(BF16, 64, True), (BF16, 128, True), (BF16, 512, False), (BF16, 1024, False)]
    + [(INT4, tokens, False) for tokens in (64, 128, 256, 512)],
)
@pytest.mark.parametrize("missing", [48, 32])
def test_a_share_is_asked_for_where_prompts_gained_on_an_h200(
    measured: tuple[float, list[tuple[float, ...]]], tokens: int, gains: bool, missing: int
) -> None:
    """By whichever times of the CPU a load saw: 64 experts, top 6, DeepSeek-V2-Lite's shape."""
    link_us, seen = measured
    for cpu_us in seen[: 2 if gains else None]:
        speeds = ManySpeeds(link_us, TOKENS, cpu_us, 100.0)
        assert worth_asking(speeds, tokens * 6 / 64, missing, 1) == gains


@pytest.mark.parametrize(
    ("samples", "steady"),
    [
        ((0.0,), True),
        ((0.0, 70.0), True),
        ((0.0, 23.0, 85.0, 134.0, 199.0, 274.0, 324.0), True),
        ((0.0, 142.0, 394.0, 570.0, 705.0, 1041.0, 1121.0), True),
        ((0.0, 1095.0, 2553.0), True),
        ((0.0, 205.0, 511.0, 1568.0, 1568.0, 1736.0, 1736.0), False),
        ((0.0, 137.0, 479.0, 3178.0, 3178.0, 3178.0, 3178.0), False),
    ],
)
def test_times_are_steady_where_more_experts_take_about_as_much_more(
    samples: tuple[float, ...], steady: bool
) -> None:
    """All but the first two were measured on H200s; the last two beside somebody who took processors away."""
    assert is_steady(samples) == steady
