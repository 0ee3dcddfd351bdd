"""Consecutive steps of a model's chain as a bundle of their own, for one of several devices. Pure.

What each device needs memory for and runs is then read off its section as it is off a whole model.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.ids import LayerId
from moec.artifacts.layout.chain import CHAIN_INPUTS, step_values
from moec.artifacts.layout.footprint import dense_weights
from moec.artifacts.steps import (
    AppendStep,
    AttentionStep,
    CapacityStep,
    ExpertsStep,
    SegmentStep,
    SelectionStep,
    StateStep,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.ids import ValueId
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.steps import Step


@dataclass(frozen=True)
class Section:
    """Steps ``first .. end - 1`` of a chain."""

    bundle: Bundle
    """Of these steps alone: their ``layer`` counts from 0, and of the weights, the MoE layers and the profile there are
    those that they use. An `ExpertsLayer` keeps its number in the whole model, by which its file is called."""
    first: int
    end: int
    arriving: tuple[ValueId, ...] = ()
    """Values of earlier sections that this one or a later one reads."""
    leaving: tuple[ValueId, ...] = ()
    """Values of this section or earlier ones that later ones read."""
    experts_before: int = 0
    """MoE layers of earlier sections."""
    layers: range = range(0)
    """Of the whole model's layers, those with a cache or a state, the ones that begin here."""

    @property
    def whole(self) -> bool:
        """Whether it is all of the chain."""
        return not self.arriving and not self.leaving


def whole_section(bundle: Bundle) -> Section:
    """All of a chain, as it is."""
    end = len(bundle.model.steps)
    return Section(bundle, 0, end, layers=layers_between(bundle.model, 0, end))


def sections_of(bundle: Bundle, cuts: Sequence[int]) -> tuple[Section, ...]:
    """A model's chain cut before the steps ``cuts``, increasing numbers of `cut_places`."""
    if not cuts:
        return (whole_section(bundle),)
    ends = (0, *cuts, len(bundle.model.steps))
    return tuple(_section(bundle, first, end) for first, end in itertools.pairwise(ends))


def cut_places(model: ModelRecord) -> list[int]:
    """Numbers of steps before which a chain may be cut.

    A layer's cache, state and index stay on one device, and so do a router and the experts that it chooses. A model
    behind an encoder has none: its sources are read by both chains.
    """
    if model.encoder:
        return []
    routing = {
        name
        for step in model.steps
        if isinstance(step, (ExpertsStep, CapacityStep))
        for name in (step.index, step.weight)
    }
    places = []
    for place in range(1, model.last_step):
        before, behind = model.steps[:place], model.steps[place:]
        kept = {_memory_of(step) for step in before} & {_memory_of(step) for step in behind} - {None}
        if not kept and not routing.intersection(crossing(model, place)):
            places.append(place)
    return places


def crossing(model: ModelRecord, place: int) -> tuple[ValueId, ...]:
    """Values made before step ``place`` and read from there on, but not the chain's inputs, which all devices have."""
    made = {name: None for step in model.steps[:place] for name in step_values(step)[1]}
    read = {name for step in model.steps[place:] for name in step_values(step)[0]}
    return tuple(name for name in made if name in read and name not in CHAIN_INPUTS)


def layers_between(model: ModelRecord, first: int, end: int) -> range:
    """The numbers of the layers, those with a cache or a state, that begin in the steps ``first .. end - 1``."""
    begun: list[int] = []
    seen: set[tuple[str, int]] = set()
    for number, step in enumerate(model.steps):
        kept = _memory_of(step)
        if isinstance(step, (AttentionStep, StateStep)) and kept is not None and kept not in seen:
            seen.add(kept)
            begun.append(number)
    return range(sum(number < first for number in begun), sum(number < end for number in begun))


def _memory_of(step: Step) -> tuple[str, int] | None:
    """What a step keeps from one step of the engine to the next."""
    if isinstance(step, (AttentionStep, AppendStep)):
        return "cache", step.layer
    if isinstance(step, SelectionStep):
        return "index", step.layer
    return ("state", step.layer) if isinstance(step, StateStep) else None


def _section(bundle: Bundle, first: int, end: int) -> Section:
    model, schedule = bundle.model, bundle.schedule
    steps = model.steps[first:end]
    layers = sorted({int(step.layer) for step in steps if isinstance(step, ExpertsStep)})
    own = dataclasses.replace(
        model,
        steps=_renumbered(steps),
        last_step=min(max(model.last_step - first, 0), len(steps)),
        experts=tuple(model.experts[layer] for layer in layers),
    )
    profile = dataclasses.replace(
        schedule.profile, layers=tuple(schedule.profile.layers[layer] for layer in layers)
    )
    weights = dense_weights(own)
    part = dataclasses.replace(
        bundle,
        model=own,
        schedule=dataclasses.replace(schedule, profile=profile),
        dense={name: place for name, place in bundle.dense.items() if name in weights},
    )
    arriving = crossing(model, first) if first else ()
    leaving = crossing(model, end) if end < len(model.steps) else ()
    return Section(
        part, first, end, arriving, leaving, layers[0] if layers else 0, layers_between(model, first, end)
    )


def _renumbered(steps: Sequence[Step]) -> tuple[Step, ...]:
    """``steps`` with the layers of each kind counted from 0."""
    numbers: dict[str, dict[int, LayerId]] = {}
    for kind in ("cache", "index", "state", "experts"):
        layers = sorted(
            {int(step.layer) for step in steps if not isinstance(step, SegmentStep) and _kind(step) == kind}
        )
        numbers[kind] = {layer: LayerId(number) for number, layer in enumerate(layers)}
    return tuple(
        step
        if isinstance(step, SegmentStep)
        else dataclasses.replace(step, layer=numbers[_kind(step)][int(step.layer)])
        for step in steps
    )


def _kind(step: Step) -> str:
    """Which layers a step's ``layer`` is counted among."""
    memory = _memory_of(step)
    return "experts" if memory is None else memory[0]
