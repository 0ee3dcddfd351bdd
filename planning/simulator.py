"""Traces replayed through every policy, at many budgets, and through the cost models of several machines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.layout.footprint import footprint
from moec.artifacts.layout.hosting import device_slots
from moec.artifacts.traces import repeats
from moec.planning.costs.prediction import CURVE_SHARES, Placement, hit_rate, token_milliseconds
from moec.planning.costs.prefetch import can_guess, layer_guesses, missing_recall, stack_positions
from moec.planning.routing.analysis import analyse
from moec.planning.routing.choice import CANDIDATES, compare
from moec.planning.routing.guesses import SOURCES
from moec.planning.routing.sides import layer_traces, replayed_groups, sides_of
from moec.planning.routing.synthetic import overlap

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.schedule import Policy, PrefetchSource
    from moec.artifacts.traces import Traces
    from moec.planning.routing.analysis import Analysis
    from moec.planning.routing.replay import Group


@dataclass(frozen=True)
class PolicyCurve:
    """One policy over budgets."""

    policy: Policy
    hit_rates: tuple[float, ...]
    of_optimal: tuple[float, ...]
    """Hit rates over those of Belady's optimum with the same admission; 1 where that has none."""


@dataclass(frozen=True)
class MachineCurve:
    """One machine over budgets."""

    machine: str
    milliseconds: tuple[float, ...]
    """Of a decoded token, under the best policy that the machine can run."""
    optimal_milliseconds: tuple[float, ...]
    """Under Belady's optimum."""


@dataclass(frozen=True)
class GuessCurve:
    """One way to guess the next layer's experts, over budgets."""

    source: PrefetchSource
    recall: float
    """Share of all chosen experts that were guessed."""
    missing: tuple[float, ...]
    """The same of those that had no slot, under the best policy with a GPU; 0 where none was missing."""
    first_right: tuple[float, ...]
    """Share of the likeliest guesses without a slot that were chosen."""


@dataclass(frozen=True)
class Simulation:
    """What replaying the traces came to; every list has an entry for each of ``shares``."""

    tokens: int
    overlap: float
    """Locality: the share of its experts that a token shares with the one before it."""
    shares: tuple[float, ...]
    """Of all experts' bytes in the fastest tier; the others are in host memory, without a GPU in the file."""
    expert_bytes: tuple[int, ...]
    policies: tuple[PolicyCurve, ...]
    """The best first; each on tokens that its profile does not know."""
    optimal: tuple[float, ...]
    """Hit rates of Belady's optimum with free admission: the most that any cache can reach."""
    fixed: tuple[float, ...]
    """Hit rates of each layer's most used experts, chosen with all tokens known. Where tokens choose independently of
    those before them no policy that does not know the future gets more."""
    machines: tuple[MachineCurve, ...]
    guesses: tuple[GuessCurve, ...]
    """None where too little was traced."""


def simulate(
    traces: Traces,
    model: ModelRecord,
    machines: Iterable[MachineRecord],
    shares: tuple[float, ...] = CURVE_SHARES,
) -> Simulation:
    """Replay ``traces`` of ``model``.

    Raises:
        BundleError: the traces are of another model.
    """
    facts = footprint(model)
    analysis = analyse(traces, model)
    profile = analysis.profile
    sides = sides_of(traces, model)
    groups = replayed_groups(sides)
    comparison = compare(groups, CANDIDATES)
    values = [layer.slot_value for layer in profile.layers]
    slots = [device_slots(facts.layers, values, int(facts.experts_bytes * share)) for share in shares]
    policies = []
    for each in comparison.candidates:
        assert each.policy is not None
        best = comparison.optimal[each.policy.admission]
        hits = [(hit_rate(facts, each, held), hit_rate(facts, best, held)) for held in slots]
        policies.append(
            PolicyCurve(
                each.policy,
                tuple(hit for hit, _ in hits),
                tuple(hit / most if most else 1.0 for hit, most in hits),
            )
        )
    curves = []
    for machine in machines:
        on_device = machine.gpu_name is not None
        policy = comparison.best(admitting=not on_device)
        chosen = next(each for each in comparison.candidates if each.policy == policy)
        optimal = comparison.optimal["better" if on_device else "always"]
        everything = tuple(layer.experts for layer in facts.layers)
        placements = [Placement(on_device, held, everything) for held in slots]
        times = [
            tuple(token_milliseconds(machine, facts, replay, each) for each in placements)
            for replay in (chosen, optimal)
        ]
        curves.append(MachineCurve(machine.name, *times))
    stride = [layer.stride_bytes for layer in facts.layers]
    layers = layer_traces(sides)
    return Simulation(
        tokens=len(sides[-1].replayed),
        overlap=float(np.mean([overlap(layer) for layer in layers])) if layers else 0.0,
        shares=shares,
        expert_bytes=tuple(sum(h * s for h, s in zip(held, stride, strict=True)) for held in slots),
        policies=tuple(policies),
        optimal=tuple(hit_rate(facts, comparison.optimal["better"], held) for held in slots),
        fixed=tuple(_fixed_rate(groups, held) for held in slots),
        machines=tuple(curves),
        guesses=_guesses(analysis, slots) if can_guess(traces) else (),
    )


def _guesses(analysis: Analysis, slots: Sequence[tuple[int, ...]]) -> tuple[GuessCurve, ...]:
    assert analysis.traces is not None
    positions = stack_positions(analysis, on_device=True)
    none = [np.ones(places.shape, np.bool_) for places in positions]
    curves: list[GuessCurve] = []
    for source in SOURCES:
        guesses = layer_guesses(source, analysis.traces, analysis.tokens, none)
        if not guesses:
            continue
        found = [
            missing_recall(
                [replace(guess, absent=positions[guess.layer] >= held[guess.layer]) for guess in guesses]
            )
            for held in slots
        ]
        curves.append(
            GuessCurve(
                source,
                missing_recall(guesses).guessed,
                tuple(each.guessed for each in found),
                tuple(each.first_right for each in found),
            )
        )
    return tuple(curves)


def _fixed_rate(groups: Sequence[Group], slots: Sequence[int]) -> float:
    """Share of chosen experts that are among the most used ones of their layer, as many as it has slots."""
    hits = choices = 0
    for group in groups:
        for chosen, number in zip(group.chosen, group.numbers, strict=True):
            again = repeats(chosen)
            uses = np.sort(np.bincount(chosen[~again], minlength=group.experts))[::-1]
            hits += int(uses[: slots[number]].sum() + again.sum())
            choices += chosen.size
    return hits / choices if choices else 1.0
