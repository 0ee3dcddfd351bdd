"""Formats for a target: sizes to the byte, times by the cost model, and messages that say what is possible."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from moec.artifacts.layout.footprint import CODE_BYTES, footprint
from moec.artifacts.schedule import Budgets
from moec.errors import BudgetError
from moec.planning.costs.prediction import token_milliseconds
from moec.planning.fitting.fit import fit_bytes, fit_time, resident_bytes, with_options
from moec.planning.fitting.losses import SWAP_LOSS, predicted_losses
from moec.planning.fitting.units import FitUnit, FormatOption
from moec.planning.planner import place, plan_analysed
from moec.planning.routing.analysis import analyse
from tests.support.tiny_bundle import CPU, GPU, tiny_model, tiny_traces

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moec.artifacts.layout.footprint import LayerFootprint
    from moec.artifacts.machine import MachineRecord

MODEL = tiny_model(((8, 2, 200), (6, 2, 200), (8, 2, 64)))
FACTS = footprint(MODEL)
BUDGETS = Budgets(0, 0, 64, 8)
ANALYSIS = analyse(tiny_traces(MODEL, tokens=64), MODEL)


def experts(layer: LayerFootprint, *losses: float) -> FitUnit:
    """Experts as they are, then of fewer and fewer bytes."""
    options = []
    for shift, loss in enumerate((0.0, *losses)):
        stride = layer.stride_bytes >> shift
        smaller = replace(layer, stride_bytes=stride, expert_bytes=layer.expert_bytes >> shift)
        options.append(FormatOption(f"f{shift}", loss, layer.experts * stride, 0, smaller))
    return FitUnit(f"layer {layer.layer}", tuple(options))


def dense(size: int, *losses: float) -> FitUnit:
    options = [
        FormatOption(f"f{shift}", loss, size >> shift, size >> shift)
        for shift, loss in enumerate((0.0, *losses))
    ]
    return FitUnit(f"dense {size}", tuple(options))


UNITS = (
    experts(FACTS.layers[0], 1.0, 4.0),
    experts(FACTS.layers[1], 0.25, 9.0),
    experts(FACTS.layers[2], 3.0),
    dense(FACTS.dense_bytes // 128 * 64, 2.0, 5.0),
)


def loss_of(chosen: Sequence[int]) -> float:
    return sum(unit.options[number].loss for unit, number in zip(UNITS, chosen, strict=True))


def every_choice() -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(len(unit.options)) for unit in UNITS))


def test_footprints_follow_the_options() -> None:
    assert with_options(FACTS, UNITS, (0, 0, 0, 0)) == FACTS
    found = with_options(FACTS, UNITS, (1, 2, 0, 1))
    saved = UNITS[3].options[0].size_bytes - UNITS[3].options[1].size_bytes
    assert found.dense_bytes == FACTS.dense_bytes - saved
    assert found.dense_bytes_per_token == FACTS.dense_bytes_per_token - saved
    assert [layer.stride_bytes for layer in found.layers] == [
        layer.stride_bytes >> shift for layer, shift in zip(FACTS.layers, (1, 2, 0), strict=True)
    ]


@pytest.mark.parametrize("on_device", [False, True])
def test_a_size_is_met_at_the_least_loss(on_device: bool) -> None:
    sizes = {
        chosen: resident_bytes(with_options(FACTS, UNITS, chosen), BUDGETS, on_device=on_device)
        for chosen in every_choice()
    }
    most = sizes[0, 0, 0, 0]
    assert most == resident_bytes(FACTS, BUDGETS, on_device=False) + CODE_BYTES * on_device
    for limit in {*sizes.values(), min(sizes.values()) + 1, most + 1}:
        found = fit_bytes(FACTS, UNITS, BUDGETS, limit, on_device=on_device)
        assert found.resident_bytes == sizes[found.chosen] <= limit
        assert loss_of(found.chosen) == min(loss_of(each) for each, size in sizes.items() if size <= limit)
    with pytest.raises(BudgetError, match=f"the least is {min(sizes.values())}") as caught:
        fit_bytes(FACTS, UNITS, BUDGETS, min(sizes.values()) - 1, on_device=on_device)
    assert "64 tokens" in caught.value.why


def test_noise_of_routers_is_no_sum() -> None:
    """Its square is: against all choices, at every size; and shares add up to the whole."""
    noisy = tuple(
        FitUnit(
            unit.name,
            tuple(
                replace(option, loss=option.loss / 10, swaps=number * (1.0 + 3 * place))
                for number, option in enumerate(unit.options)
            ),
        )
        for place, unit in enumerate(UNITS)
    )

    def predicted(chosen: Sequence[int]) -> float:
        picked = [unit.options[number] for unit, number in zip(noisy, chosen, strict=True)]
        noise = sum(option.swaps for option in picked)
        return sum(option.loss for option in picked) + SWAP_LOSS * math.sqrt(noise)

    sizes = {
        chosen: resident_bytes(with_options(FACTS, noisy, chosen), BUDGETS, on_device=False)
        for chosen in every_choice()
    }
    best = 0
    for limit in set(sizes.values()):
        chosen = fit_bytes(FACTS, noisy, BUDGETS, limit, on_device=False).chosen
        assert sum(predicted_losses(noisy, chosen)) == pytest.approx(predicted(chosen))
        least = min(predicted(each) for each, size in sizes.items() if size <= limit)
        assert predicted(chosen) <= 1.06 * least
        best += predicted(chosen) == pytest.approx(least)
    assert best > 0.9 * len(set(sizes.values()))


def test_what_fits_is_planned_as_resident() -> None:
    """The planner, with the same bytes for the model, keeps every expert on the GPU, and not with a byte less."""
    size = resident_bytes(FACTS, BUDGETS, on_device=False)
    machine = replace(GPU, gpu_memory_bytes=1 << 40)
    for limit, everything in ((size, True), (size - 1, False)):
        found = plan_analysed(ANALYSIS, MODEL, Budgets(limit, 1 << 40, 64, 8), machine)
        slots = [layer.slots for layer in found.layers]
        assert (slots == [layer.experts for layer in MODEL.experts]) is everything


def exact(
    chosen: Sequence[int], budgets: Budgets, machine: MachineRecord, units: Sequence[FitUnit] = UNITS
) -> float:
    """By the planner, for experts of other sizes."""
    facts = with_options(FACTS, units, chosen)
    placed = place(facts, ANALYSIS.profile, budgets, machine)
    tier = ANALYSIS.device if placed.placement.on_device else ANALYSIS.host
    return token_milliseconds(machine, facts, tier.replay, placed.placement)


@pytest.mark.parametrize("kind", ["resident", "offloaded", "cpu"])
def test_a_time_is_met_at_the_least_loss(kind: str) -> None:
    """Against all choices, by the exact cost model; the search is one by prices, and finds the best of these."""
    everything = resident_bytes(FACTS, BUDGETS, on_device=False)
    machine = CPU if kind == "cpu" else replace(GPU, gpu_memory_bytes=1 << 40)
    room = {"resident": 2 * everything, "offloaded": everything * 2 // 3, "cpu": 0}[kind]
    budgets = Budgets(room, 1 << 40, 64, 8)
    times = {chosen: exact(chosen, budgets, machine) for chosen in every_choice()}
    least, most = min(times.values()), max(times.values())
    for part in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        target = least + part * (most - least)
        found = fit_time(FACTS, UNITS, budgets, machine, ANALYSIS, target)
        assert found.milliseconds == times[found.chosen] <= target
        best = min(loss_of(each) for each, time in times.items() if time <= target)
        assert loss_of(found.chosen) <= best * (1.0 if kind != "offloaded" else 1.25)
    with pytest.raises(BudgetError, match="the least is"):
        fit_time(FACTS, UNITS, budgets, machine, ANALYSIS, least * 0.99)


def test_codes_that_cost_more_time_than_their_bytes_save_are_left_alone() -> None:
    """With a fast GPU and small experts the smallest formats are not the fastest: dense weights alone pay."""
    coded = [
        replace(
            unit,
            options=tuple(
                option
                if option.layer is None or number == 0
                else replace(option, layer=replace(option.layer, quantized=True))
                for number, option in enumerate(unit.options)
            ),
        )
        for unit in UNITS
    ]
    machine = replace(GPU, gpu_memory_bytes=1 << 40)
    budgets = Budgets(2 * resident_bytes(FACTS, BUDGETS, on_device=False), 1 << 40, 64, 8)
    times = {chosen: exact(chosen, budgets, machine, coded) for chosen in every_choice()}
    least = min(times.values())
    assert times[(2, 2, 1, 2)] > times[(0, 0, 0, 0)] > times[(0, 0, 0, 2)] == least
    found = fit_time(FACTS, coded, budgets, machine, ANALYSIS, least)
    assert (found.chosen, found.milliseconds) == ((0, 0, 0, 2), least)
    assert fit_time(FACTS, coded, budgets, machine, ANALYSIS, 1e9).chosen == (0, 0, 0, 0)
    with pytest.raises(BudgetError, match=f"the least is {least:.3g} ms"):
        fit_time(FACTS, coded, budgets, machine, ANALYSIS, least * 0.99)


def test_a_machine_without_room_is_refused() -> None:
    analysis = analyse(None, MODEL)
    with pytest.raises(BudgetError, match="does not run"):
        fit_time(FACTS, UNITS, Budgets(1, 1, 64, 8), GPU, analysis, 1e9)


def test_the_choice_is_the_same_each_time() -> None:
    limit = resident_bytes(FACTS, BUDGETS, on_device=False) * 2 // 3
    found = {fit_bytes(FACTS, UNITS, BUDGETS, limit, on_device=False).chosen for _ in range(3)}
    assert len(found) == 1
