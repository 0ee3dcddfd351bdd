"""What a GPU may bring ahead of the router: by which guess, how much, and the memory for it. Pure arithmetic.

E experts, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.layout.footprint import dense_weights
from moec.artifacts.schedule import NO_PREFETCH
from moec.artifacts.words.ahead import MOST_TOKENS, ahead_words, guessed_layers
from moec.artifacts.words.slots import MOST_AHEAD, PIECE_BYTES, expert_pieces
from moec.planning.costs.token import idle_bytes
from moec.runtime.device import padded_bytes
from moec.runtime.experts.prefetch import nothing_to_guess_by
from moec.runtime.routing.early_router import router_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.ids import TensorName
    from moec.artifacts.layout.footprint import Footprint
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.schedule import PrefetchSource, RoutingProfile, Schedule

UNKNOWN_BOUND_BYTES = 4 << 20
"""For a layer where no schedule says how long the link is idle: 0.08 ms of a PCIe 5 link."""


@dataclass(frozen=True)
class LayerAhead:
    """One guessed MoE layer; places are bytes from the beginning of the block that all layers share."""

    layer: int
    before: int
    """The layer at which it is guessed."""
    words: int
    """See `moec.artifacts.words.ahead`."""
    scores: int
    """float32 ``[MOST_TOKENS, E]``."""
    weight: int | None
    """Of the router, bfloat16 ``[E, H]``, or of the votes, float32 ``[E before, E]``; ``None``: the router that the
    model has is taken."""
    router: TensorName | None
    """That one, where it is taken."""


@dataclass(frozen=True)
class AheadPlan:
    """What is guessed, and the memory for it."""

    source: PrefetchSource
    pieces: int
    """Most pieces to bring for one layer."""
    layers: tuple[LayerAhead, ...]
    block_bytes: int
    asked: bool
    """Whether the user asked for it, and not only the schedule."""

    @property
    def staging_bytes(self) -> int:
        """Of the memory that pieces are brought to."""
        return self.pieces * PIECE_BYTES

    @property
    def size_bytes(self) -> int:
        """Of the GPU's memory that all of it takes."""
        return self.block_bytes + self.staging_bytes


def plan_ahead(
    bundle: Bundle, facts: Footprint, schedule: Schedule | None, wanted: bool | None
) -> AheadPlan | None:
    """What a GPU brings ahead, or ``None`` where it brings nothing.

    Args:
        bundle: the model.
        facts: what it takes.
        schedule: that the model runs by.
        wanted: ``None``: as the schedule says; True: on, by the schedule's source or else by the candidate of the best
            recall; False: off.

    Raises:
        RequestError: it is wanted, and there is nothing to guess by.
    """
    planned = NO_PREFETCH if schedule is None else schedule.prefetch
    if wanted is False or (wanted is None and planned.source == "none"):
        return None
    model, profile = bundle.model, bundle.schedule.profile
    pairs = guessed_layers(model)
    able: dict[PrefetchSource, list[int]] = {
        "router": _with_router(model, pairs),
        "transitions": _with_transitions(profile, pairs),
    }
    recalls = {each.source: each.recall for each in planned.candidates}
    ranked = sorted(
        able, key=lambda source: (source == planned.source, recalls.get(source, 0.0)), reverse=True
    )
    source = next((source for source in ranked if able[source]), None)
    if source is None:
        if wanted and pairs:
            raise nothing_to_guess_by()
        return None
    layers, size = _places(bundle, source, able[source], pairs)
    return AheadPlan(source, _bound(facts, schedule) // PIECE_BYTES, layers, size, bool(wanted))


def _bound(facts: Footprint, schedule: Schedule | None) -> int:
    """Most bytes for a layer: as planned, or what crosses the link while it is idle; whole experts at most."""
    size = UNKNOWN_BOUND_BYTES
    if schedule is not None:
        size = schedule.prefetch.bytes_per_layer or idle_bytes(schedule.machine, facts)
    most = max(expert_pieces(layer.stride_bytes, layer.second_bytes) for layer in facts.layers)
    return PIECE_BYTES * max(1, min(size // PIECE_BYTES, MOST_AHEAD * most))


def _with_router(model: ModelRecord, pairs: dict[int, int]) -> list[int]:
    names = router_names(model)
    return [layer for layer in pairs if names[layer] is not None]


def _with_transitions(profile: RoutingProfile, pairs: dict[int, int]) -> list[int]:
    return [layer for layer, before in pairs.items() if any(profile.layers[before].transitions)]


def _places(
    bundle: Bundle, source: PrefetchSource, guessed: Sequence[int], pairs: dict[int, int]
) -> tuple[tuple[LayerAhead, ...], int]:
    model, end = bundle.model, 0
    names, specs = router_names(model), dense_weights(model)
    found: list[LayerAhead] = []
    for layer in guessed:
        experts, before, weight = model.experts[layer].experts, pairs[layer], 0
        router = names[layer] if source == "router" else None
        if router is None:
            weight = 4 * model.experts[before].experts * experts
        elif bundle.dense[router].dtype != "bfloat16" or specs[router].format is not None:
            weight, router = 2 * experts * model.hidden_size, None
        scores = end + padded_bytes(8 * ahead_words(experts))
        last = scores + padded_bytes(4 * MOST_TOKENS * experts)
        found.append(LayerAhead(layer, before, end, scores, last if weight else None, router))
        end = last + padded_bytes(weight)
    return tuple(found), end
