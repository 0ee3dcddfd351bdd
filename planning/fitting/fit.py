"""A format for each part of a model, so that the whole plan meets a target at the least predicted loss. Pure functions.

U units: the routed experts of a layer, the products of a segment step, the embedding, the head.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from moec.artifacts.layout.footprint import CODE_BYTES
from moec.errors import BudgetError
from moec.planning.costs.prediction import token_milliseconds
from moec.planning.fitting.knapsack import Option, choose
from moec.planning.fitting.losses import least_loss
from moec.planning.planner import model_bytes, place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.artifacts.ids import LayerId
    from moec.artifacts.layout.footprint import Footprint, LayerFootprint
    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.schedule import Budgets
    from moec.planning.fitting.units import FitUnit
    from moec.planning.routing.analysis import Analysis

ROUNDS = 8
"""Most times that prices are estimated anew."""
BISECTIONS = 12
"""Linear budgets that are tried each time."""


@dataclass(frozen=True)
class Fit:
    """What was chosen."""

    chosen: tuple[int, ...]
    """The number of each unit's option."""
    facts: Footprint
    """Of the model with these formats."""
    resident_bytes: int
    milliseconds: float | None


def with_options(facts: Footprint, units: Sequence[FitUnit], chosen: Sequence[int]) -> Footprint:
    """The footprint of a model whose units have other options than their first."""
    layers: dict[LayerId, LayerFootprint] = {layer.layer: layer for layer in facts.layers}
    dense = read = 0
    for unit, number in zip(units, chosen, strict=True):
        before, after = unit.options[0], unit.options[number]
        if after.layer is not None:
            layers[after.layer.layer] = after.layer
        else:
            dense += after.size_bytes - before.size_bytes
            read += after.read_bytes - before.read_bytes
    return dataclasses.replace(
        facts,
        layers=tuple(layers.values()),
        dense_bytes=facts.dense_bytes + dense,
        dense_bytes_per_token=facts.dense_bytes_per_token + read,
    )


def resident_bytes(facts: Footprint, budgets: Budgets, *, on_device: bool) -> int:
    """What lies in the tier that computes with all experts there; on a GPU its code and graphs too."""
    return model_bytes(facts, budgets).total + facts.experts_bytes + (CODE_BYTES if on_device else 0)


def fit_bytes(
    facts: Footprint, units: Sequence[FitUnit], budgets: Budgets, limit_bytes: int, *, on_device: bool
) -> Fit:
    """Everything resident in ``limit_bytes``.

    Args:
        facts: of the model with the first options.
        units: what there is to choose.
        budgets: context and tokens of a step that must find room.
        limit_bytes: of the memory that computes.
        on_device: whether that is a GPU's, which keeps code and graphs there too.

    Raises:
        BudgetError: it is not even met by the smallest options; the message has the least that is.
    """
    fixed = resident_bytes(facts, budgets, on_device=on_device) - sum(
        unit.options[0].size_bytes for unit in units
    )

    def find(priced: Sequence[FitUnit]) -> tuple[int, ...] | None:
        options = [[Option(each.loss, each.size_bytes) for each in unit.options] for unit in priced]
        return choose(options, limit_bytes - fixed)

    chosen = least_loss(units, find)
    if chosen is None:
        smallest = sum(min(option.size_bytes for option in unit.options) for unit in units)
        least = fixed + smallest
        raise BudgetError(
            f"No choice of formats fits {limit_bytes} bytes: the least is {least}.",
            f"Weights in their smallest formats take {smallest} of these; {fixed} are for a sequence of "
            f"{budgets.context_tokens} tokens, a step, and what stays as it is.",
            f"Ask for --fit {math.ceil(least / 2**20)}MiB or more, or for a time per token: experts need not all "
            "be resident.",
        )
    found = with_options(facts, units, chosen)
    return Fit(chosen, found, resident_bytes(found, budgets, on_device=on_device), None)


def fit_time(
    facts: Footprint,
    units: Sequence[FitUnit],
    budgets: Budgets,
    machine: MachineRecord,
    analysis: Analysis,
    milliseconds: float,
) -> Fit:
    """A decoded token within ``milliseconds`` by the cost model, experts being wherever the planner puts them.

    The time is no sum over units: fewer bytes anywhere make room for experts. So each round takes the time as linear
    in every unit's bytes, with prices measured at the last choice, and chooses by these with several budgets;
    the best choice whose exact time meets the target is where the next round begins.

    Args:
        facts: of the model with the first options.
        units: what there is to choose.
        budgets: bytes on each tier of ``machine``.
        machine: its speeds.
        analysis: of the routing.
        milliseconds: the target.

    Raises:
        BudgetError: it is not even met by the fastest options; the message has the least that is.
    """
    on_device = machine.gpu_name is not None and budgets.device_memory_bytes > 0
    tier = analysis.device if on_device else analysis.host

    @cache
    def exact(chosen: tuple[int, ...]) -> float:
        found = with_options(facts, units, chosen)
        try:
            placed = place(found, analysis.profile, budgets, machine)
        except BudgetError:
            return math.inf
        return token_milliseconds(machine, found, tier.replay, placed.placement)

    smallest = tuple(
        min(range(len(unit.options)), key=lambda n: (unit.options[n].size_bytes, unit.options[n].loss, n))
        for unit in units
    )
    begin = smallest if exact(smallest) <= milliseconds else _faster(units, smallest, exact)
    if exact(begin) > milliseconds:
        raise _too_slow(
            milliseconds, exact(begin), machine, facts, with_options(facts, units, begin), budgets
        )

    def find(priced: Sequence[FitUnit]) -> tuple[int, ...]:
        chosen = begin
        for _ in range(ROUNDS):
            found = _next_choice(priced, chosen, exact, milliseconds)
            if found == chosen:
                break
            chosen = found
        return chosen

    chosen = least_loss(units, find)
    assert chosen is not None
    result = with_options(facts, units, chosen)
    return Fit(chosen, result, resident_bytes(result, budgets, on_device=on_device), exact(chosen))


def _faster(
    units: Sequence[FitUnit], chosen: tuple[int, ...], exact: Callable[[tuple[int, ...]], float]
) -> tuple[int, ...]:
    """Each unit in turn in its fastest format: to widen codes can take longer than reading fewer bytes saves."""
    for number, unit in enumerate(units):
        others = [(*chosen[:number], option, *chosen[number + 1 :]) for option in range(len(unit.options))]
        chosen = min((chosen, *others), key=exact)
    return chosen


def _next_choice(
    units: Sequence[FitUnit],
    current: tuple[int, ...],
    exact: Callable[[tuple[int, ...]], float],
    milliseconds: float,
) -> tuple[int, ...]:
    """The least loss found by prices at ``current``, of choices whose exact time meets the target, as its own does."""

    def loss(chosen: Sequence[int]) -> float:
        return sum(unit.options[number].loss for unit, number in zip(units, chosen, strict=True))

    now = exact(current)
    prices = [_price(units, current, number, exact, now) for number in range(len(units))]
    options = [
        [Option(each.loss, price * (each.size_bytes - unit.options[own].size_bytes)) for each in unit.options]
        for unit, price, own in zip(units, prices, current, strict=True)
    ]
    room = highest = milliseconds - now
    lowest, best = 0.0, current
    for _ in range(BISECTIONS):
        found = choose(options, room)
        assert found is not None, "what is chosen now costs nothing"
        if exact(found) > milliseconds:
            highest = room
        else:
            lowest, best = room, min(best, found, key=loss)
        if lowest == milliseconds - now:
            break
        room = (lowest + highest) / 2
    return best


def _price(
    units: Sequence[FitUnit],
    current: tuple[int, ...],
    number: int,
    exact: Callable[[tuple[int, ...]], float],
    now: float,
) -> float:
    """Milliseconds for each byte of a unit, by the option next to its own in size that can be had at all."""
    options, own = units[number].options, units[number].options[current[number]]
    others = [n for n, option in enumerate(options) if option.size_bytes != own.size_bytes]
    for other in sorted(others, key=lambda n: (abs(options[n].size_bytes - own.size_bytes), n)):
        then = exact((*current[:number], other, *current[number + 1 :]))
        if math.isfinite(then):
            return max(0.0, (then - now) / (options[other].size_bytes - own.size_bytes))
    return 0.0


def _too_slow(
    milliseconds: float,
    least: float,
    machine: MachineRecord,
    facts: Footprint,
    fastest: Footprint,
    budgets: Budgets,
) -> BudgetError:
    if math.isinf(least):
        return BudgetError(
            f"The model does not run on {machine.name} in any formats.",
            f"Without routed experts it takes {model_bytes(fastest, budgets).total} bytes in the smallest formats, "
            f"{model_bytes(facts, budgets).total} as it is.",
            "Name a machine with more memory.",
        )
    return BudgetError(
        f"No choice of formats gives {milliseconds:g} ms a token on {machine.name}: the least is {least:.3g} ms.",
        f"With the fastest formats a token still reads {fastest.dense_bytes_per_token} bytes of dense weights and "
        f"{sum(layer.top_k * layer.expert_bytes for layer in fastest.layers)} of experts, of which some come from "
        "slower memory where the GPU does not hold all.",
        f"Ask for --fit {math.ceil(100 * least) / 100:g}ms or more, or name a faster machine.",
    )
