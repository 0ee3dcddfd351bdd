"""Where a chain is cut for several GPUs: by each one's memory and measured speeds. Pure arithmetic.

A token passes one GPU after the other, so what counts is the sum of their times: of a GPU what its dense weights and
chosen experts take of its own memory, and what the missing ones take over its link. The cuts of the least sum are found
exactly, by dynamic programming over the steps at which a chain may be cut.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.layout.footprint import (
    cache_token_bytes,
    dense_bytes,
    dense_weights,
    footprint,
    looked_up,
    tensor_bytes,
)
from moec.artifacts.model import DTYPE_BYTES
from moec.artifacts.sections import cut_places, layers_between
from moec.artifacts.states import state_bytes
from moec.artifacts.steps import AttentionStep, ExpertsStep, SelectionStep, StateStep
from moec.planning.costs.token import BYTES_PER_MS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.model import ModelRecord
    from moec.artifacts.schedule import RoutingProfile
    from moec.artifacts.steps import Step

HIT_STEPS = 64
"""Hits are told for the share of experts that have a slot in so many equal steps."""
USUAL_POWER = 0.5
"""Hits of routing that nobody has traced grow with this power of the share of experts that have a slot.

DeepSeek-V2-Lite's shape, by random weights and by forced Zipf routing, hit 0.29 to 0.44 at 16 %, 0.69 to 0.77 at 50 and
0.87 to 0.90 at 75."""
NOISE = 0.15
"""By which short measurements of equal GPUs differ."""
BALANCE = 0.01
"""What it weighs beside time that GPUs are filled alike: of cuts that take nearly the same time those win that do."""


@dataclass(frozen=True)
class Unit:
    """What a step of a chain takes of a GPU, or several that are not cut apart."""

    fixed_bytes: int = 0
    """Dense weights, states and tables."""
    page_bytes: int = 0
    """A page of the key-value cache."""
    expert_bytes: int = 0
    """All routed experts."""
    read_bytes: int = 0
    """Of dense weights, by one token."""
    active_bytes: int = 0
    """Of the experts that one token chooses."""

    def __add__(self, other: Unit) -> Unit:
        return Unit(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Unit) -> Unit:
        return Unit(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class GpuRoom:
    """One GPU, in the order in which they follow each other. Speeds in GB/s."""

    room_bytes: int
    """For what `Unit` counts: the budget, less what a section needs whatever its steps."""
    bandwidth_gb_s: float
    link_gb_s: float


@dataclass(frozen=True)
class DividedChain:
    """A chain as it may be divided."""

    places: tuple[int, ...]
    """Steps before which it may be cut."""
    units: tuple[Unit, ...]
    """One more: what lies between them."""
    hits: tuple[float, ...]
    """Entry i: the share of choices that are hits where ``i / HIT_STEPS`` of all experts have a slot."""
    stage_bytes: int
    """Of a GPU where not all experts of its steps fit: all experts of one layer pass through."""


def divided_chain(
    model: ModelRecord, profile: RoutingProfile, max_batch: int, table_bytes: Sequence[int]
) -> DividedChain:
    """What `divide` looks at of a model.

    Args:
        model: the chain.
        profile: what slots are worth.
        max_batch: sequences at once, which have states.
        table_bytes: of each MoE layer, what a GPU needs to know of its experts.
    """
    places = cut_places(model)
    weights = [dense_weights(replace(model, steps=(step,), encoder=())) for step in model.steps]
    seen: set[tuple[str, int]] = set()
    units: list[Unit] = []
    layers = footprint(model).layers
    for step, own in zip(model.steps, weights, strict=True):
        routed = layers[step.layer] if isinstance(step, ExpertsStep) else None
        table = table_bytes[step.layer] if isinstance(step, ExpertsStep) else 0
        units.append(
            Unit(
                sum(map(dense_bytes, own.values())) + _state_bytes(model, step, max_batch) + table,
                _page_bytes(model, step, seen),
                0 if routed is None else routed.experts * routed.stride_bytes,
                sum(tensor_bytes(spec) for spec in own.values() if not looked_up(model, step, spec)),
                0 if routed is None else routed.top_k * routed.expert_bytes,
            )
        )
    ends = (0, *places, len(units))
    joined = [sum(units[first:end], Unit()) for first, end in pairwise(ends)]
    stage = max((layer.experts * layer.stride_bytes for layer in layers), default=0)
    return DividedChain(tuple(places), tuple(joined), _hits(model, profile), stage)


def evened(speeds: Sequence[float]) -> list[float]:
    """Measured speeds, those within `NOISE` of the fastest as fast as it: equal GPUs are to have equal parts."""
    fastest = max(speeds)
    return [fastest if speed >= (1 - NOISE) * fastest else speed for speed in speeds]


def divide(
    chain: DividedChain, gpus: Sequence[GpuRoom], pages: int, *, resident: bool
) -> tuple[int, ...] | None:
    """The steps before which the chain is cut; ``None`` where no cuts fit the GPUs.

    Args:
        chain: the model.
        gpus: in order; each gets at least one unit.
        pages: of the key-value cache, in each layer.
        resident: whether all experts are to fit, or a cache of them.
    """
    units = [replace(unit, fixed_bytes=unit.fixed_bytes + pages * unit.page_bytes) for unit in chain.units]
    sums = list(accumulate(units, initial=Unit()))
    whole = sums[-1]
    scale = BALANCE * (whole.read_bytes + whole.active_bytes) / gpus[0].bandwidth_gb_s / BYTES_PER_MS
    count = len(units)
    nowhere: tuple[float, tuple[int, ...]] = (math.inf, ())
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ()), *[nowhere] * count]
    for number, gpu in enumerate(gpus):
        ends = range(number + 1, count + 1) if number < len(gpus) - 1 else [count]
        fresh = [nowhere] * (count + 1)
        for end in ends:
            fresh[end] = min(
                (
                    (
                        best[first][0] + _cost(chain, gpu, sums[end] - sums[first], scale, resident),
                        (*best[first][1], end),
                    )
                    for first in range(end)
                    if best[first][0] < math.inf
                ),
                default=nowhere,
            )
        best = fresh
    cost, chosen = best[count]
    return None if cost == math.inf else tuple(chain.places[end - 1] for end in chosen[:-1])


@dataclass(frozen=True)
class GpuPart:
    """What one GPU of a division has."""

    layers: range
    """Of those with a cache or a state."""
    fixed_bytes: int
    """Dense weights, cache, states and tables."""
    expert_bytes: int
    """All experts of its layers."""
    kept_bytes: int
    """Those for which it has slots."""


def parts_of(
    model: ModelRecord, chain: DividedChain, gpus: Sequence[GpuRoom], pages: int, cuts: Sequence[int]
) -> tuple[GpuPart, ...]:
    """What each GPU has by the ``cuts`` of `divide`."""
    ends = [0, *(chain.places.index(cut) + 1 for cut in cuts), len(chain.units)]
    steps = [0, *cuts, len(model.steps)]
    found = []
    for gpu, units, bounds in zip(gpus, pairwise(ends), pairwise(steps), strict=True):
        own = sum(chain.units[slice(*units)], Unit())
        fixed = own.fixed_bytes + pages * own.page_bytes
        kept = _kept_bytes(chain, gpu.room_bytes - fixed, own.expert_bytes)
        found.append(GpuPart(layers_between(model, *bounds), fixed, own.expert_bytes, kept))
    return tuple(found)


def _kept_bytes(chain: DividedChain, free: int, expert_bytes: int) -> int:
    """Of slots in so many free bytes: all experts, or what the stage leaves."""
    return expert_bytes if free >= expert_bytes else max(0, free - chain.stage_bytes)


def _cost(chain: DividedChain, gpu: GpuRoom, own: Unit, scale: float, resident: bool) -> float:
    """Milliseconds of a token on one GPU, and a little for how full it is; infinite where it does not fit."""
    free = gpu.room_bytes - own.fixed_bytes
    if free < (own.expert_bytes if resident else 0):
        return math.inf
    kept = _kept_bytes(chain, free, own.expert_bytes)
    share = 1.0 if kept == own.expert_bytes else hit_share(chain.hits, kept / own.expert_bytes)
    near = (own.read_bytes + own.active_bytes) / gpu.bandwidth_gb_s
    far = own.active_bytes * (1 - share) / gpu.link_gb_s
    filled = (own.fixed_bytes + kept) / max(1, gpu.room_bytes)
    return (near + far) / BYTES_PER_MS + scale * filled**2


def hit_share(hits: Sequence[float], kept: float) -> float:
    """The share of choices that are hits where ``kept`` of all experts have a slot, between two entries of ``hits``."""
    place = HIT_STEPS * kept
    below = min(HIT_STEPS - 1, int(place))
    return hits[below] + (hits[below + 1] - hits[below]) * (place - below)


def _state_bytes(model: ModelRecord, step: Step, max_batch: int) -> int:
    """The states that a step advances, of all sequences and of one more that logits are asked of."""
    if not isinstance(step, StateStep):
        return 0
    return (max_batch + 1) * state_bytes(next(spec for spec in model.states if spec.name == step.state))


def _page_bytes(model: ModelRecord, step: Step, seen: set[tuple[str, int]]) -> int:
    """A page of what a step appends to; ``seen``: what earlier steps have told."""
    if isinstance(step, SelectionStep):
        index = next(spec for spec in model.selections if spec.name == step.selection)
        size, kept = index.dim * DTYPE_BYTES[index.dtype], ("index", int(step.layer))
    elif isinstance(step, AttentionStep):
        attention = next(spec for spec in model.attentions if spec.name == step.attention)
        size, kept = cache_token_bytes(attention), ("cache", int(step.layer))
    else:
        return 0
    first = kept not in seen
    seen.add(kept)
    return PAGE_TOKENS * size if first else 0


def _hits(model: ModelRecord, profile: RoutingProfile) -> tuple[float, ...]:
    """Of all layers together, each with the same share of its experts in slots.

    A profile without traces says that experts are used alike, by which it would not matter who has how many slots.
    """
    if profile.provenance == "uniform":
        return tuple((number / HIT_STEPS) ** USUAL_POWER for number in range(HIT_STEPS + 1))
    chosen = sum(layer.top_k for layer in model.experts)
    found = []
    for number in range(HIT_STEPS + 1):
        hit = sum(
            sum(each.slot_value[: number * len(each.slot_value) // HIT_STEPS]) for each in profile.layers
        )
        found.append(min(1.0, hit / chosen) if chosen else 1.0)
    return tuple(found)
