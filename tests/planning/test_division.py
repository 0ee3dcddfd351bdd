"""Where a chain is cut for several GPUs: by brute force over all cuts, and on real models' chains."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from moec.planning import division
from moec.planning.division import HIT_STEPS, DividedChain, GpuRoom, Unit, divide, evened

PAGES = 2
HITS = tuple((number / HIT_STEPS) ** 0.5 for number in range(HIT_STEPS + 1))


def chain(units: int, seed: int, stage: int = 30) -> DividedChain:
    random = np.random.default_rng(seed)
    drawn = tuple(Unit(*(int(value) for value in random.integers(1, 100, 5))) for _ in range(units))
    return DividedChain(tuple(range(3, 3 + 2 * (units - 1), 2)), drawn, HITS, stage)


def cost(chain: DividedChain, gpus: list[GpuRoom], cuts: tuple[int, ...], resident: bool) -> float:
    """By the definition: what each GPU reads near and far, and how full it is."""
    ends = (0, *(chain.places.index(cut) + 1 for cut in cuts), len(chain.units))
    everything = (
        sum(unit.read_bytes + unit.active_bytes for unit in chain.units) / gpus[0].bandwidth_gb_s / 1e6
    )
    total = 0.0
    for gpu, first, end in zip(gpus, ends, ends[1:], strict=False):
        own = chain.units[first:end]
        fixed, experts = (
            sum(unit.fixed_bytes + PAGES * unit.page_bytes for unit in own),
            sum(unit.expert_bytes for unit in own),
        )
        active, read = sum(unit.active_bytes for unit in own), sum(unit.read_bytes for unit in own)
        free = gpu.room_bytes - fixed
        if free < 0 or (resident and free < experts):
            return math.inf
        kept = experts if free >= experts else max(0, free - chain.stage_bytes)
        missed = (
            0.0 if kept == experts else 1 - np.interp(kept / experts, np.linspace(0, 1, HIT_STEPS + 1), HITS)
        )
        total += float(((read + active) / gpu.bandwidth_gb_s + missed * active / gpu.link_gb_s) / 1e6)
        total += division.BALANCE * everything * ((fixed + kept) / gpu.room_bytes) ** 2
    return total


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("rooms", [(900, 900), (1900, 600), (700, 700, 900), (300, 300)])
def test_cuts_are_the_best_of_all(seed: int, resident: bool, rooms: tuple[int, ...]) -> None:
    drawn = chain(9, seed)
    gpus = [GpuRoom(room, 100.0 + 50 * (seed % 3) * n, 5.0 + n) for n, room in enumerate(rooms)]
    choices = itertools.combinations(drawn.places, len(rooms) - 1)
    best = min(cost(drawn, gpus, cuts, resident) for cuts in choices)
    found = divide(drawn, gpus, PAGES, resident=resident)
    if found is None:
        assert best == math.inf
    else:
        assert cost(drawn, gpus, found, resident) == pytest.approx(best)


def test_equal_gpus_get_equal_halves_and_a_larger_one_more() -> None:
    units = (Unit(6, 2, 100, 10, 20),) * 20
    even = DividedChain(tuple(range(1, 20)), units, HITS, 0)
    equal, larger = GpuRoom(800, 100.0, 10.0), GpuRoom(1400, 100.0, 10.0)
    assert divide(even, [equal, equal], PAGES, resident=False) == (10,)
    (cut,) = divide(even, [equal, larger], PAGES, resident=False) or ()
    assert cut < 9
    assert divide(even, [equal, equal], PAGES, resident=True) is None
    assert divide(even, [larger, larger], PAGES, resident=True) == (10,)


def test_speeds_that_differ_by_chance_are_equal() -> None:
    assert evened([100.0, 90.0, 50.0]) == [100.0, 100.0, 50.0]
    units = (Unit(6, 2, 100, 10, 20),) * 20
    even = DividedChain(tuple(range(1, 20)), units, HITS, 0)
    gpus = [GpuRoom(5000, speed, 10.0) for speed in evened([98.0, 101.0])]
    assert divide(even, gpus, PAGES, resident=True) == (10,)


def test_a_chain_that_cannot_be_cut_often_enough_is_not_divided() -> None:
    assert (
        divide(
            DividedChain((4,), (Unit(1), Unit(1)), HITS, 0), [GpuRoom(9, 1.0, 1.0)] * 3, PAGES, resident=True
        )
        is None
    )
