"""What a model will take on the host, held against the budget before it is allocated. Pure arithmetic.

What each part takes is `moec.artifacts.layout.footprint`'s to say, as it is for the planner.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.sizes import exact_bytes, human_bytes
from moec.errors import BudgetError, RequestError
from moec.runtime.engine.pages import pages_for

if TYPE_CHECKING:
    from moec.artifacts.layout.footprint import Footprint

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}
_UNITS |= {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "tb": 10**12, "tib": 1 << 40}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the host by purpose; within the budget, if there is one."""

    dense_bytes: int
    cache_bytes: int
    cache_pages: int
    state_bytes: int
    """The states of all sequences at once, where layers have some."""
    activation_bytes: int
    """Of the largest step, an upper bound."""
    table_bytes: int
    """The tables that say where each expert is."""
    expert_capacity_bytes: int
    """The most expert bytes resident at once."""
    expert_bytes: int
    """All routed experts."""

    @property
    def total_bytes(self) -> int:
        """The most that will be resident."""
        experts = min(self.expert_capacity_bytes, self.expert_bytes)
        kept = self.dense_bytes + self.cache_bytes + self.state_bytes
        return kept + self.activation_bytes + self.table_bytes + experts


def parse_memory(value: int | float | str, total_bytes: int, name: str) -> int:
    """Bytes of a budget: an integer, ``"8GiB"``, ``"75%"``, or a ratio of ``total_bytes`` up to 1.

    Raises:
        RequestError: it is none of these, or not above 0.
    """
    given = value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z%]*)\s*", value)
        unit = match[2].lower() if match else "?"
        if match and unit == "%":
            value = float(match[1]) / 100
        elif match and (unit in _UNITS) and not (unit == "" and "." in match[1]):
            number = float(match[1]) * _UNITS[unit]
            value = int(number) if math.isfinite(number) else number
        elif match and unit == "":
            value = float(match[1])
    if isinstance(value, float) and 0 < value <= 1:
        value = int(total_bytes * value)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise RequestError(
            f"{name}={given!r} is not an amount of memory.",
            "It must be bytes, a text such as 8GiB or 75%, or a ratio of all memory such as 0.75.",
            f"Change {name}.",
        )
    return value


def plan_memory(
    model: Footprint,
    *,
    max_context: int,
    host_memory: int | None,
    available_bytes: int,
    cache_tokens: int | None,
    max_batch: int,
    max_step_tokens: int,
) -> MemoryPlan:
    """Divide the host's memory.

    Args:
        model: what its parts take.
        max_context: tokens of one sequence, its source among them.
        host_memory: the budget in bytes; ``None``: no limit.
        available_bytes: what the machine has free; also to size the cache where ``cache_tokens`` is ``None``.
        cache_tokens: tokens of key-value cache, all sequences together. ``None``: ``max_batch`` full
            contexts, but no more than a quarter of the budget or of what is free.
        max_batch: sequences at once.
        max_step_tokens: tokens of the largest step.

    Raises:
        BudgetError: the budget does not hold the least that is needed, or the machine has not so much free for what
            is no file; nothing was allocated.
    """
    least_experts, page = model.working_set_bytes, model.cache_page_bytes
    activations = model.activation_bytes(max_step_tokens, max_batch)
    states = model.states_bytes(max_batch)
    fixed = model.dense_bytes + states + activations + model.table_bytes
    limit = available_bytes if host_memory is None else host_memory
    if cache_tokens is None:
        pages = max(1, min(max_batch * pages_for(max_context), limit // 4 // max(1, page)))
        if host_memory is not None:
            pages = max(1, min(pages, (host_memory - fixed - least_experts) // max(1, page)))
    else:
        pages = pages_for(cache_tokens)
    cache = model.cache_bytes(pages * PAGE_TOKENS)
    if host_memory is not None and fixed + cache + least_experts > host_memory:
        raise _too_small(host_memory, model, cache, states, activations)
    if cache + states + activations > available_bytes:
        raise BudgetError(
            f"This machine has {human_bytes(available_bytes)} of memory free, and "
            f"{human_bytes(cache + states + activations)} are needed.",
            f"The key-value cache takes {human_bytes(cache)}, {_states(states)}activations "
            f"{human_bytes(activations)}; weights stay in their files.",
            "Lower cache_tokens, max_step_tokens or max_batch: fewer or shorter sequences at once.",
        )
    capacity = model.experts_bytes
    if host_memory is not None:
        capacity = min(capacity, host_memory - fixed - cache)
    return MemoryPlan(
        model.dense_bytes, cache, pages, states, activations, model.table_bytes, capacity, model.experts_bytes
    )


def _states(size: int) -> str:
    """For messages, where a model has states."""
    return f"states of sequences {human_bytes(size)}, " if size else ""


def _too_small(budget: int, model: Footprint, cache: int, states: int, activations: int) -> BudgetError:
    experts = model.working_set_bytes
    needed = model.dense_bytes + cache + states + activations + model.table_bytes + experts
    return BudgetError(
        f"host_memory is {exact_bytes(needed - budget)} too small: it must be {exact_bytes(needed)} at least.",
        f"Dense weights take {human_bytes(model.dense_bytes)}, the key-value cache {human_bytes(cache)}, "
        f"{_states(states)}activations {human_bytes(activations)}, tables of experts "
        f"{human_bytes(model.table_bytes)}, and the experts of one token {human_bytes(experts)}.",
        "Raise host_memory, or lower cache_tokens, max_step_tokens or max_batch.",
    )
