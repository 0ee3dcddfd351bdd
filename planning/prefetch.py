"""Prefetch: whether guessing the next layer's experts gains anything, by the cost model, on traces.

Experts that are guessed right and have no slot are fetched before they are asked for, while what brings them (the link,
without a GPU the disk) would idle. What does not fit into that time delays the layer's own misses.

Dimension names: N tokens, K chosen experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.schedule import PrefetchFigures, PrefetchPlan
from moec.planning.choice import LEAST_TOKENS
from moec.planning.cost import BYTES_PER_MS, dense_milliseconds, miss_cost
from moec.planning.guesses import SOURCES, halves
from moec.planning.replay import stack_places, use_shares

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from moec.artifacts.footprint import Footprint, LayerFootprint
    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.schedule import PrefetchSource
    from moec.artifacts.traces import Traces
    from moec.planning.analysis import Analysis
    from moec.planning.policies import Integers
    from moec.planning.prediction import Placement

FOLLOWED: dict[bool, tuple[PrefetchSource, ...]] = {True: (), False: ("router", "transitions")}
"""Sources that the runtime can follow with a GPU, and without: a GPU's experts are fetched by its own kernels, after
its router; the figures say what guessing would bring there."""

NO_PREFETCH = PrefetchPlan("none", 0, ())


@dataclass(frozen=True, eq=False)
class LayerGuess:
    """The guesses for one MoE layer, and what came."""

    layer: int
    chosen: Integers
    """``[N, K]``."""
    guessed: Integers
    """``[N, K]``, likeliest first."""
    absent: npt.NDArray[np.bool_]
    """``[N, E]``: experts that have no slot when the token comes."""


@dataclass(frozen=True)
class _LayerResult:
    """Means over tokens, for one layer and one bound."""

    fetched: float
    wasted: float
    gain: float
    """Milliseconds."""


def prefetch_plan(
    machine: MachineRecord, facts: Footprint, analysis: Analysis, placement: Placement
) -> PrefetchPlan:
    """The candidate and the bound that gain the most, or none."""
    traces = analysis.traces
    if traces is None or traces.tokens < LEAST_TOKENS or len(facts.layers) < 2:
        return NO_PREFETCH
    if traces.encoder is not None:  # layers that follow one another do not see the same tokens
        return NO_PREFETCH
    absent = absences(analysis, placement)
    found: list[tuple[PrefetchFigures, int]] = []
    for source in SOURCES:
        guesses = layer_guesses(source, traces, analysis.tokens, absent)
        if guesses:
            found.append(_best_bound(source, guesses, machine, facts, on_device=placement.on_device))
    followed = [each for each in found if each[0].source in FOLLOWED[placement.on_device]]
    figures, bound = max(followed, key=lambda each: each[0].gain_milliseconds, default=(None, 0))
    candidates = tuple(each for each, _ in found)
    if figures is None or figures.gain_milliseconds <= 0:
        return PrefetchPlan("none", 0, candidates)
    stride = max(layer.stride_bytes for layer in facts.layers)
    return PrefetchPlan(figures.source, bound * stride, candidates)


def absences(analysis: Analysis, placement: Placement) -> list[npt.NDArray[np.bool_]]:
    """Of each MoE layer, which experts have no slot before each of the analysed tokens, ``[N, E]``."""
    traces, tier = analysis.traces, analysis.device if placement.on_device else analysis.host
    assert traces is not None
    found = []
    for layer, slots in zip(traces.layers, placement.slots, strict=True):
        shares = use_shares(layer.chosen[None].astype(np.int64), layer.experts)
        order = np.argsort(-shares, axis=1, kind="stable")
        chosen = layer.chosen[None, analysis.tokens].astype(np.int64)
        found.append(stack_places(tier.policy, chosen, order, shares)[0] >= slots)
    return found


def layer_guesses(
    source: PrefetchSource, traces: Traces, tokens: Integers, absent: Sequence[npt.NDArray[np.bool_]]
) -> list[LayerGuess]:
    """Guesses for every layer that ``source`` has some for; both halves, each from the other."""
    splits = halves(traces, tokens)
    found = []
    for number, layer in enumerate(traces.layers):
        parts = [SOURCES[source](split, number) for split in splits if len(split.tokens)]
        if parts and all(part is not None for part in parts):
            guessed = np.concatenate([part for part in parts if part is not None])
            found.append(LayerGuess(number, layer.chosen[tokens].astype(np.int64), guessed, absent[number]))
    return found


def _best_bound(
    source: PrefetchSource,
    guesses: Sequence[LayerGuess],
    machine: MachineRecord,
    facts: Footprint,
    *,
    on_device: bool,
) -> tuple[PrefetchFigures, int]:
    """The number of experts a layer that gains the most, and its figures; at least one expert."""
    right = [(each.guessed[:, :, None] == each.chosen[:, None, :]).any(axis=1) for each in guesses]
    recall, exact = (float(np.mean([how(hit) for hit in right])) for how in (np.mean, _all_right))
    best: tuple[PrefetchFigures, int] | None = None
    for bound in range(1, max(each.guessed.shape[1] for each in guesses) + 1):
        results = [_evaluate(each, bound, machine, facts, on_device=on_device) for each in guesses]
        sizes = [facts.layers[each.layer].expert_bytes for each in guesses]
        figures = PrefetchFigures(
            source=source,
            recall=round(recall, 4),
            exact_match=round(exact, 4),
            fetched_bytes_per_token=sum(r.fetched * size for r, size in zip(results, sizes, strict=True)),
            wasted_bytes_per_token=sum(r.wasted * size for r, size in zip(results, sizes, strict=True)),
            gain_milliseconds=sum(result.gain for result in results),
        )
        if best is None or figures.gain_milliseconds > best[0].gain_milliseconds:
            best = figures, bound
    assert best is not None
    return best


def _all_right(hit: npt.NDArray[np.bool_]) -> float:
    return float(hit.all(axis=1).mean())


def _evaluate(
    guess: LayerGuess, bound: int, machine: MachineRecord, facts: Footprint, *, on_device: bool
) -> _LayerResult:
    rows = np.arange(len(guess.chosen))[:, None]
    wanted = np.zeros(guess.absent.shape, np.bool_)
    wanted[rows, guess.chosen] = True
    missing = guess.absent[rows, guess.guessed]
    fetched = missing & (np.cumsum(missing, axis=1) <= bound)
    useful = (fetched & wanted[rows, guess.guessed]).sum(axis=1)
    misses = (wanted & guess.absent).sum(axis=1)
    costs, bring, idle = _times(machine, facts, facts.layers[guess.layer], on_device=on_device)
    late = np.maximum(0.0, fetched.sum(axis=1) * bring - idle)
    gain = costs[misses] - costs[misses - useful] - late
    return _LayerResult(
        float(fetched.sum(axis=1).mean()), float((fetched.sum(axis=1) - useful).mean()), float(gain.mean())
    )


def _times(
    machine: MachineRecord, facts: Footprint, layer: LayerFootprint, *, on_device: bool
) -> tuple[npt.NDArray[np.float64], float, float]:
    """Of one layer: milliseconds with 0..K misses, those to bring one expert, and those in which nothing is brought."""
    size = layer.expert_bytes / BYTES_PER_MS
    dense = dense_milliseconds(machine, facts, on_device=on_device) / max(1, len(facts.layers))
    if on_device:
        bring = size / (machine.link_gb_s * machine.link_efficiency)
        return np.array(miss_cost(machine, layer).milliseconds, np.float64), bring, dense
    # The system reads the file while the CPU computes the layer before.
    computing = layer.top_k * size / (machine.host_bandwidth_gb_s * machine.host_efficiency)
    bring = size / machine.disk_gb_s
    return np.arange(layer.top_k + 1, dtype=np.float64) * bring, bring, dense + computing
