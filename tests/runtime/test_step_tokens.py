from __future__ import annotations

from itertools import pairwise

import pytest

from moec.artifacts.sizes import human_bytes
from moec.errors import BudgetError
from moec.runtime.memory.device_budget import DeviceNeeds, DevicePlan, plan_device_memory
from moec.runtime.memory.step_tokens import MOST_STEP_TOKENS, plan_largest_step, step_sizes

WEIGHTS, TOKEN, PAGE = 1_000_000, 1000, 2000
CONTEXT, BATCH = 3200, 4
FULL_PAGES = BATCH * 100


def largest(limit: int, cache_tokens: int | None = None) -> DevicePlan:
    def plan(tokens: int) -> DevicePlan:
        needs = DeviceNeeds(WEIGHTS, 0, 0, 0, tokens * TOKEN, 0, 0, 0, PAGE, tokens)
        return plan_device_memory(
            needs, max_context=CONTEXT, limit_bytes=limit, cache_tokens=cache_tokens, max_batch=BATCH
        )

    return plan_largest_step(plan, max_batch=BATCH, max_context=CONTEXT, cache_tokens=cache_tokens)


def test_sizes_go_down_from_what_all_sequences_have_to_a_decoding_step() -> None:
    assert step_sizes(8, 100_000)[:3] == [MOST_STEP_TOKENS, 2048, 1024]
    assert step_sizes(8, 100_000)[-1] == 9
    assert step_sizes(8, 100)[0] == 800
    assert step_sizes(1, 1) == [2]
    assert step_sizes(6000, 100_000) == [6001]
    for batch in (1, 3, 8, 500):
        assert all(larger > smaller for larger, smaller in pairwise(step_sizes(batch, 4096)))


def test_with_room_for_everything_the_step_is_large() -> None:
    plan = largest(100_000_000)
    assert (plan.needs.step_tokens, plan.cache_pages) == (MOST_STEP_TOKENS, FULL_PAGES)


def test_a_large_step_leaves_the_cache_its_share() -> None:
    """Where the cache is not full size the step takes an eighth of what both have."""
    both = 700_000
    plan = largest(WEIGHTS + both)
    assert plan.cache_pages < FULL_PAGES
    assert both / 16 < plan.needs.step_tokens * TOKEN <= both / 8


def test_a_cache_that_was_asked_for_comes_first() -> None:
    cache = 320
    room = 10 * PAGE + 700 * TOKEN + 256
    plan = largest(WEIGHTS + room, cache)
    assert (plan.cache_pages, plan.needs.step_tokens) == (10, 512)


def test_the_smallest_step_is_tried_before_anything_is_refused() -> None:
    needed = largest(WEIGHTS + 10 * TOKEN + 2 * PAGE)
    assert needed.needs.step_tokens == BATCH + 1
    with pytest.raises(BudgetError) as caught:
        largest(WEIGHTS)
    assert f"a step {human_bytes((BATCH + 1) * TOKEN)}," in caught.value.why
