"""Cache policies as small integers for each expert: the planner, the CPU's store and the GPU evaluate the same.

Each expert has two counters that change (``uses``, ``last``) and one that does not (``prior``); each layer has a
clock of tokens. From them a policy makes a *score*, and the expert with the least score leaves. All arithmetic is on
non-negative integers below 2^63, with divisions that round down, so a block of a GPU with one thread an expert
gets the same bits. What a layer does in a step is always this, in this order:

1. ``count``: the clock goes on by the step's tokens, and the counters of every chosen expert change, whether or not
   it has a slot.
2. ``keys``: the score of every expert, and below it the expert's number: no two are alike. The least key leaves;
   of equal scores that of the expert with the higher number.
3. ``replacements``: chosen experts without a slot take one, in the order in which they were chosen. An expert that
   this step chose never leaves. Where a CPU computes some of them, ``divided`` says which; those take no slot.

A kernel needs no more than `UNIT`, `EXPERT_BITS`, `SCORES` (which score, by the policy's name) and `half_life_shift`.
Dimension names: E experts, L layers that are counted together (any leading dimensions).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.schedule import DEFAULT_POLICY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from moec.artifacts.schedule import Policy, PolicyName

    Integers = npt.NDArray[np.int64]

UNIT = 1 << 12
"""What ``uses`` and ``prior`` count in: a use is so many."""
MOST_USES = (1 << 32) - 1
"""Where ``uses`` stops growing, so that it fits 32 bits."""
EXPERT_BITS = 16
"""Low bits of a key, which hold 65535 minus the expert's number; the score is above them."""
_EXPERT_MASK = (1 << EXPERT_BITS) - 1


@dataclass(eq=False)
class PolicyState:
    """The counters of layers that are counted together. All arrays are int64 with values that fit 32 bits."""

    uses: Integers
    """``[L, E]``, in `UNIT`."""
    last: Integers
    """``[L, E]``: the clock when the expert was last chosen; 0: never."""
    prior: Integers
    """``[L, E]``, in `UNIT`: ``prior_tokens`` times the expert's use in the profile; never changes."""
    clock: int = 0
    """Tokens so far."""


def always_admitting(policy: Policy) -> Policy:
    """``policy`` for a tier that must hold whatever is in use, such as host memory where the CPU computes."""
    if policy.admission == "always":
        return policy
    return DEFAULT_POLICY if policy.name == "static" else dataclasses.replace(policy, admission="always")


def initial_state(policy: Policy, use_shares: npt.ArrayLike) -> PolicyState:
    """The counters before the first token.

    Args:
        policy: of the schedule.
        use_shares: ``[L, E]`` or ``[E]``, by expert number: the share of traced tokens that chose it.
    """
    shares = np.asarray(use_shares, np.float64)
    prior = np.floor(policy.prior_tokens * shares * UNIT + 0.5).astype(np.int64)
    # lfru lets the prior age like uses; where it stands beside the uses, these start at nothing.
    uses = prior.copy() if policy.name == "lfru" else np.zeros_like(prior)
    return PolicyState(uses, np.zeros_like(prior), prior)


def half_life_shift(policy: Policy) -> int:
    """``half_life_tokens`` as a power of two."""
    return max(0, policy.half_life_tokens.bit_length() - 1)


def count(
    policy: Policy, state: PolicyState, chosen: tuple[Integers, ...], counts: Integers, tokens: int
) -> None:
    """Note that ``tokens`` tokens came.

    Args:
        policy: says how uses fade.
        state: changed.
        chosen: an index of the chosen experts of each layer into ``[L, E]``, none twice.
        counts: how many of the tokens chose each, in the same order.
        tokens: of the step.
    """
    state.clock += tokens
    uses = state.uses[chosen]
    if policy.name in FADING:
        uses = faded(uses, state.clock - state.last[chosen], half_life_shift(policy))
    state.uses[chosen] = np.minimum(uses + counts * UNIT, MOST_USES)
    state.last[chosen] = state.clock


def faded(uses: Integers, age: Integers, shift: int) -> Integers:
    """``uses`` halved every ``2^shift`` tokens, and on a straight line between two halvings."""
    halved = uses >> np.minimum(age >> shift, 63)
    left: Integers = halved - ((halved * (age & ((1 << shift) - 1))) >> (shift + 1))
    return left


def _lru(policy: Policy, state: PolicyState) -> Integers:
    del policy
    return state.last


def _lfru(policy: Policy, state: PolicyState) -> Integers:
    del policy
    scores: Integers = (state.uses << 12) // (state.clock - state.last + 1)
    return scores


def _fading(policy: Policy, state: PolicyState) -> Integers:
    return faded(state.uses, state.clock - state.last, half_life_shift(policy)) + state.prior


def _static(policy: Policy, state: PolicyState) -> Integers:
    del policy
    return state.prior


SCORES: dict[PolicyName, Callable[[Policy, PolicyState], Integers]] = {
    "lru": _lru,
    "lfru": _lfru,
    "lrfu": _fading,
    "lfu": _fading,
    "static": _static,
}
"""Policy name to score, ``[L, E]``, below 2^45. What each means is said at `moec.artifacts.schedule.Policy`."""

FADING = frozenset({"lrfu", "lfu"})
"""Policies whose uses fade."""


def keys(policy: Policy, state: PolicyState) -> Integers:
    """What decides who leaves, ``[L, E]``: the least; never alike for two experts of a layer."""
    experts = state.last.shape[-1]
    return (SCORES[policy.name](policy, state) << EXPERT_BITS) | (_EXPERT_MASK - np.arange(experts))


def experts_of(some_keys: Integers) -> Integers:
    """The expert that each key belongs to."""
    return _EXPERT_MASK - (some_keys & _EXPERT_MASK)


def replacements(
    policy: Policy,
    layer_keys: Integers,
    resident: npt.NDArray[np.bool_],
    chosen: list[int],
    slots: int,
) -> list[tuple[int, int | None]]:
    """Who takes whose slot in one layer.

    Args:
        policy: says whom it lets in.
        layer_keys: ``[E]``, after ``count``.
        resident: ``[E]``: which experts have a slot.
        chosen: the step's experts, none twice, in the order in which they were chosen.
        slots: of the layer.

    Returns:
        ``(expert, victim)`` for each expert that takes a slot, in order; victim ``None``: the slot was free.
    """
    held = resident.copy()
    held[chosen] = False
    victims = np.sort(layer_keys[held]).tolist()
    free = slots - int(resident.sum())
    taken: list[tuple[int, int | None]] = []
    place = 0
    for expert in chosen:
        if resident[expert]:
            continue
        if free > 0:
            free -= 1
            taken.append((expert, None))
        elif place < len(victims) and (
            policy.admission == "always" or int(layer_keys[expert]) > victims[place]
        ):
            taken.append((expert, int(experts_of(np.int64(victims[place])))))  # type: ignore[arg-type]
            place += 1
    return taken


def worth_margin(policy: Policy, uses: float) -> int:
    """By how much a key must be greater than another to be ahead of it by so many uses; -1: the policy counts none."""
    return round(uses * UNIT) << EXPERT_BITS if policy.name in FADING else -1


def divided(
    layer_keys: Integers,
    resident: npt.NDArray[np.bool_],
    chosen: list[int],
    slots: int,
    cpu_share: Sequence[int],
    margin: int,
    *,
    in_turn: bool,
) -> tuple[list[int], list[int]]:
    """The missing experts of a layer, divided between those that are fetched and those that a CPU computes.

    Args:
        layer_keys: ``[E]``, after ``count``.
        resident: ``[E]``: which experts have a slot.
        chosen: the step's experts, none twice, in the order in which they were chosen.
        slots: of the layer.
        cpu_share: entry m: of m missing experts the CPU has so many; the last entry is true of more.
        margin: of `worth_margin`: where all would be the CPU's, the first one is fetched if its key is greater by more
            than that than the least key of an expert that can leave, or a slot is free.
        in_turn: whether the first one is fetched where ``margin`` is -1.

    Returns:
        Both in the order in which they come: as they were chosen where the CPU has none, otherwise by falling key.
    """
    missing = [expert for expert in chosen if not resident[expert]]
    by_cpu = min(cpu_share[min(len(missing), len(cpu_share) - 1)], len(missing))
    if not by_cpu:
        return missing, []
    ordered = sorted(missing, key=lambda expert: -int(layer_keys[expert]))
    if by_cpu == len(missing):
        held = resident.copy()
        held[chosen] = False
        can_leave, is_free = layer_keys[held], int(resident.sum()) < slots
        ahead = is_free or bool(can_leave.size and layer_keys[ordered[0]] - margin > can_leave.min())
        by_cpu -= in_turn if margin < 0 else ahead
    if not by_cpu:
        return missing, []
    return ordered[: len(ordered) - by_cpu], ordered[len(ordered) - by_cpu :]
