"""How many tokens the largest step of a GPU has where nobody says: many, unless memory is short. Pure arithmetic.

A step of a mixture of experts reads nearly all weights from some hundred tokens on, so prompts of several sequences
take half the time in steps of twice the tokens, until arithmetic is what takes the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.errors import BudgetError
from moec.runtime.engine.pages import pages_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.runtime.memory.device_budget import DevicePlan

CPU_STEP_TOKENS = 512
"""A CPU's arithmetic takes the time from far fewer tokens on."""
MOST_STEP_TOKENS = 4096
ARENA_SHARE = 1 / 8
"""The most that a large step takes of what it shares with the key-value cache, where that is not full size."""


def step_sizes(max_batch: int, max_context: int) -> list[int]:
    """Step sizes to try, the largest first: no more than all sequences together have, down to one decoding step."""
    least = max_batch + 1
    size = max(least, min(MOST_STEP_TOKENS, max_batch * max_context))
    sizes = [size]
    while size > least:
        size = max(least, size // 2)
        sizes.append(size)
    return sizes


def plan_largest_step(
    plan: Callable[[int], DevicePlan], *, max_batch: int, max_context: int, cache_tokens: int | None
) -> DevicePlan:
    """The plan of the largest step that leaves the cache its room.

    Args:
        plan: plans memory for a step of so many tokens; raises `BudgetError` where that does not fit.
        max_batch: sequences at once.
        max_context: tokens of one sequence.
        cache_tokens: what the cache must hold; ``None``: it takes what there is, up to ``max_batch`` full contexts.

    Raises:
        BudgetError: the smallest step does not fit either.
    """
    fitting: DevicePlan | None = None
    refusal: BudgetError | None = None
    full = max_batch * pages_for(max_context) if cache_tokens is None else pages_for(cache_tokens)
    for tokens in step_sizes(max_batch, max_context):
        try:
            fitting = plan(tokens)
        except BudgetError as error:
            refusal = error
            continue
        shared = fitting.limit_bytes - fitting.needs.fixed_bytes + fitting.needs.arena_bytes
        if fitting.cache_pages == full or fitting.needs.arena_bytes <= ARENA_SHARE * shared:
            return fitting
    if fitting is None:
        assert refusal is not None, "there is always a size to try"
        raise refusal
    return fitting


def plan_offloaded_step(plan: Callable[[int], DevicePlan], *, max_batch: int, max_context: int) -> DevicePlan:
    """The plan of the largest step that leaves cached experts their room; arguments as for `plan_largest_step`.

    Raises:
        BudgetError: the smallest step does not fit either.
    """
    *larger, least = step_sizes(max_batch, max_context)
    for tokens in larger:
        try:
            fitting = plan(tokens)
        except BudgetError:
            continue
        if fitting.needs.arena_bytes <= ARENA_SHARE * fitting.limit_bytes:
            return fitting
    return plan(least)
