"""Prefetch: whether guessing the next layer's experts gains anything, by the cost model, on traces.

Experts that are guessed right and have no slot are fetched before they are asked for, while what brings them (the link,
without a GPU the disk) would idle. What does not fit into that time delays the layer's own misses. A CPU brings whole
experts; a GPU brings pieces, so that a part of an expert can be what fits.

Dimension names: N tokens, K chosen experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.schedule import NO_PREFETCH, PrefetchFigures, PrefetchPlan
from moec.artifacts.words.ahead import guessed_layers
from moec.artifacts.words.slots import MOST_AHEAD, PIECE_BYTES
from moec.planning.costs.token import BYTES_PER_MS, idle_bytes, idle_milliseconds, miss_cost
from moec.planning.routing.choice import LEAST_TOKENS
from moec.planning.routing.guesses import SOURCES, guessable, halves
from moec.planning.routing.replay import by_use, stack_places, use_shares

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from moec.artifacts.layout.footprint import Footprint, LayerFootprint
    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.schedule import PrefetchSource
    from moec.artifacts.traces import Traces
    from moec.planning.costs.prediction import Placement
    from moec.planning.policies import Integers
    from moec.planning.routing.analysis import Analysis

FOLLOWED: tuple[PrefetchSource, ...] = ("router", "transitions")
"""Sources that the runtime can follow; of others the figures say what they would bring."""

GUESS_US = 11.0
"""What a guess costs a layer on a GPU, measured on an H200 (decision 27): waiting for the branch, the check, and copies
that run beside attention."""


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


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What came of the guesses for one layer; it does not depend on a bound."""

    missing: npt.NDArray[np.bool_]
    """``[N, K]``: guesses that had no slot."""
    right: npt.NDArray[np.bool_]
    """``[N, K]``: guesses that were chosen."""
    misses: Integers
    """``[N]``: chosen experts that had no slot."""


@dataclass(frozen=True, eq=False)
class _Times:
    """Of one layer, in milliseconds."""

    costs: npt.NDArray[np.float64]
    """With 0..K misses."""
    bring: float
    """To bring one expert."""
    idle: float
    """In which nothing is brought."""
    guess: float
    """What a guess costs."""


@dataclass(frozen=True)
class _LayerResult:
    """Means over tokens, for one layer and one bound."""

    fetched: float
    wasted: float
    gain: float
    """Milliseconds."""


def prefetch_plan(
    machine: MachineRecord, model: ModelRecord, facts: Footprint, analysis: Analysis, placement: Placement
) -> PrefetchPlan:
    """The candidate and the bound that gain the most, or none."""
    traces = analysis.traces
    if traces is None or not can_guess(traces):
        return NO_PREFETCH
    on_device = placement.on_device
    able = guessed_layers(model) if on_device else range(len(facts.layers))
    absent = absences(analysis, placement)
    found: list[tuple[PrefetchFigures, float]] = []
    for source in SOURCES:
        guesses = layer_guesses(source, traces, analysis.tokens, absent)
        guesses = [guess for guess in guesses if guess.layer in able]
        if guesses:
            found.append(_best_bound(source, guesses, machine, facts, on_device=on_device))
    followed = [each for each in found if each[0].source in FOLLOWED]
    figures, bound = max(followed, key=lambda each: each[0].gain_milliseconds, default=(None, 0))
    candidates = tuple(each for each, _ in found)
    if figures is None or figures.gain_milliseconds <= 0:
        return PrefetchPlan("none", 0, candidates)
    size = round(bound * max(layer.stride_bytes for layer in facts.layers))
    if on_device:
        size = -(-size // PIECE_BYTES) * PIECE_BYTES
    return PrefetchPlan(figures.source, size, candidates)


def can_guess(traces: Traces) -> bool:
    """Whether enough was traced; behind an encoder, layers that follow one another do not see the same tokens."""
    return traces.tokens >= LEAST_TOKENS and len(traces.layers) > 1 and traces.encoder is None


@dataclass(frozen=True)
class MissingRecall:
    """How well a guess knows the experts that have no slot."""

    guessed: float
    """Share of the misses that were guessed."""
    first_right: float
    """Share of the likeliest guesses without a slot that were chosen: what a GPU brings first."""


def missing_recall(guesses: Sequence[LayerGuess]) -> MissingRecall:
    """Over all tokens of all guessed layers; shares of nothing are 0."""
    counts = np.zeros(4)
    for guess in guesses:
        found = _outcome(guess)
        missing, right = found.missing, found.right
        first = missing & (np.cumsum(missing, axis=1) == 1)
        counts += found.misses.sum(), (missing & right).sum(), first.sum(), (first & right).sum()
    misses, known, firsts, hits = counts.tolist()
    return MissingRecall(known / max(1, misses), hits / max(1, firsts))


def stack_positions(analysis: Analysis, *, on_device: bool) -> list[Integers]:
    """Of each MoE layer, each expert's place on the policy's stack before each of the analysed tokens, ``[N, E]``.

    With so many slots as its place or fewer it has none.
    """
    traces, tier = analysis.traces, analysis.device if on_device else analysis.host
    assert traces is not None
    found = []
    for layer in traces.layers:
        shares = use_shares(layer.chosen[None].astype(np.int64), layer.experts)
        chosen = layer.chosen[None, analysis.tokens].astype(np.int64)
        found.append(stack_places(tier.policy, chosen, by_use(shares), shares)[0])
    return found


def absences(analysis: Analysis, placement: Placement) -> list[npt.NDArray[np.bool_]]:
    """Of each MoE layer, which experts have no slot before each of the analysed tokens, ``[N, E]``."""
    positions = stack_positions(analysis, on_device=placement.on_device)
    return [places >= slots for places, slots in zip(positions, placement.slots, strict=True)]


def layer_guesses(
    source: PrefetchSource, traces: Traces, tokens: Integers, absent: Sequence[npt.NDArray[np.bool_]]
) -> list[LayerGuess]:
    """Guesses for every layer and token that ``source`` has some for; both halves, each from the other."""
    found = []
    for number, layer in enumerate(traces.layers):
        able = guessable(source, traces, number, tokens)
        own = tokens[able]
        splits = halves(traces, own)
        parts = [SOURCES[source](split, number) for split in splits if len(split.tokens)]
        if parts and all(part is not None for part in parts):
            guessed = np.concatenate([part for part in parts if part is not None])
            found.append(
                LayerGuess(number, layer.chosen[own].astype(np.int64), guessed, absent[number][able])
            )
    return found


def _best_bound(
    source: PrefetchSource,
    guesses: Sequence[LayerGuess],
    machine: MachineRecord,
    facts: Footprint,
    *,
    on_device: bool,
) -> tuple[PrefetchFigures, float]:
    """The number of experts a layer that gains the most, and its figures; more than none."""
    outcomes = [_outcome(each) for each in guesses]
    recall, exact = (float(np.mean([how(each.right) for each in outcomes])) for how in (np.mean, _all_right))
    times = [_times(machine, facts, facts.layers[each.layer], on_device=on_device) for each in guesses]
    sizes = [facts.layers[each.layer].expert_bytes for each in guesses]
    best: tuple[PrefetchFigures, float] | None = None
    for bound in _bounds(guesses, machine, facts, on_device=on_device):
        results = [_evaluate(*each, bound) for each in zip(outcomes, times, strict=True)]
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


def _bounds(
    guesses: Sequence[LayerGuess], machine: MachineRecord, facts: Footprint, *, on_device: bool
) -> list[float]:
    """Experts a layer to try: whole numbers, and on a GPU as much of one as crosses the link while it idles."""
    most = max(each.guessed.shape[1] for each in guesses)
    if not on_device:
        return [float(count) for count in range(1, most + 1)]
    stride = max(layer.stride_bytes for layer in facts.layers)
    idle = idle_bytes(machine, facts) // PIECE_BYTES * PIECE_BYTES / stride
    whole = [float(count) for count in range(1, min(most, MOST_AHEAD) + 1)]
    return sorted({*whole, min(max(idle, PIECE_BYTES / stride), whole[-1])})


def _outcome(guess: LayerGuess) -> _Outcome:
    rows = np.arange(len(guess.chosen))[:, None]
    wanted = np.zeros(guess.absent.shape, np.bool_)
    wanted[rows, guess.chosen] = True
    misses = (wanted & guess.absent).sum(axis=1)
    return _Outcome(guess.absent[rows, guess.guessed], wanted[rows, guess.guessed], misses)


def _evaluate(outcome: _Outcome, times: _Times, bound: float) -> _LayerResult:
    missing, right, misses = outcome.missing, outcome.right, outcome.misses
    # Experts are brought one after the other; of the last one as much as is left.
    share = np.where(missing, np.clip(bound - (np.cumsum(missing, axis=1) - 1), 0.0, 1.0), 0.0)
    fetched, useful = share.sum(axis=1), (share * right).sum(axis=1)
    costs = times.costs
    late = np.maximum(0.0, fetched * times.bring - times.idle) + times.guess
    gain = costs[misses] - np.interp(misses - useful, np.arange(len(costs)), costs) - late
    return _LayerResult(float(fetched.mean()), float((fetched - useful).mean()), float(gain.mean()))


def _times(machine: MachineRecord, facts: Footprint, layer: LayerFootprint, *, on_device: bool) -> _Times:
    size = layer.expert_bytes / BYTES_PER_MS
    idle = idle_milliseconds(machine, facts, on_device=on_device)
    if on_device:
        bring = size / (machine.link_gb_s * machine.link_efficiency)
        costs = np.array(miss_cost(machine, layer).milliseconds, np.float64)
        return _Times(costs, bring, idle, GUESS_US / 1000)
    # The system reads the file while the CPU computes the layer before.
    computing = layer.top_k * size / (machine.host_bandwidth_gb_s * machine.host_efficiency)
    bring = size / machine.disk_gb_s
    return _Times(np.arange(layer.top_k + 1, dtype=np.float64) * bring, bring, idle + computing, 0.0)
