"""Experts brought to a GPU before their layer's router has spoken: the words that kernels and host share, and names.

At a MoE layer ``check_guess(index [T, K] int64, ahead [A] int64)`` holds the guess that was made for it against its
choices. Beside the fetch of its own experts ``score_early(x [T, H] float32, router [E, H] bfloat16, scores [T, E]
float32)`` or ``score_votes(index [T, K] int64, votes [E', E] float32, scores [T, E] float32)`` scores the experts of
the next layer, ``guess_experts(scores [T, E], state [W] int64, ahead [A] int64)`` chooses by that, and once the link is
free ``bring_ahead(state)`` brings the first pieces of the likeliest missing ones. ``state`` (see `slots`) and ``ahead``
are the guessed layer's. ``fetch_experts`` takes the pieces from there.

E experts, K of them chosen. All words are int64.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from moec.artifacts.steps import ExpertsStep

if TYPE_CHECKING:
    from moec.artifacts.model import ModelRecord

CHECK = "check_guess"
SCORE_EARLY = "score_early"
SCORE_VOTES = "score_votes"
GUESS = "guess_experts"
BRING = "bring_ahead"
"""The functions' names in a CUDA target's module."""

MOST_TOKENS = 8
"""Of a step that is guessed for: larger ones want most experts anyway."""
MOST_GUESSED = 256
"""Guessed experts, of all tokens together."""

BOUND = 0
"""Most pieces to bring for the layer."""
STAGING = 1
"""Where they go, memory that all layers share."""
TOP_K = 2
"""How many experts are guessed for a token."""
TOKENS = 3
"""Of the guess that stands; 0: there is none."""
CHOSEN, RIGHT, SEEN, EXACT, FETCHED = 8, 9, 10, 11, 12
"""Counters, one behind the other: chosen experts of tokens that had a guess; those that were guessed; such tokens;
those of which all were guessed; bytes brought."""
GUESSED = 16
"""``[MOST_GUESSED]``: of each token ``TOP_K`` experts, likeliest first."""
HOMES = GUESSED + MOST_GUESSED
"""``[E]``: where each expert always is in host memory, 0 where it is in the file."""


def ahead_words(experts: int) -> int:
    """Words of a layer, a multiple of 64 bytes."""
    return HOMES + -(-experts // 8) * 8


def guessed_layers(model: ModelRecord) -> dict[int, int]:
    """The MoE layers that can be guessed for, each with the one before it.

    Both run in one part of a step: on all of its tokens, or on the rows whose logits are wanted. An encoder's do not.
    """
    parts = model.steps[: model.last_step], model.steps[model.last_step :]
    ordinals = [[step.layer for step in part if isinstance(step, ExpertsStep)] for part in parts]
    return {after: before for part in ordinals for before, after in pairwise(part)}
