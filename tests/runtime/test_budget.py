from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moec.artifacts.layout.footprint import footprint
from moec.errors import BudgetError, RequestError
from moec.runtime.memory.budget import parse_memory, plan_memory
from tests.support import fake_chain

GIB = 1 << 30


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, 5),
        ("8GiB", 8 * GIB),
        ("8 gib", 8 * GIB),
        ("1.5GB", 1_500_000_000),
        ("512m", 512 << 20),
        ("123", 123),
        (0.75, 750),
        (1.0, 1000),
        ("75%", 750),
        ("0.5", 500),
    ],
)
def test_memory_is_read_as_people_write_it(value: Any, expected: int) -> None:
    assert parse_memory(value, 1000, "host_memory") == expected


@pytest.mark.parametrize(
    "value", [0, -1, "", "8 potatoes", "-1GiB", 1.5, "150%", True, None, "nan", "1.5", "9" * 400]
)
def test_other_amounts_are_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="host_memory"):
        parse_memory(value, 1000, "host_memory")


def plan(host_memory: int | None, dense: int = 1000, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "available_bytes": GIB,
        "cache_tokens": 64,
        "max_batch": 2,
        "max_step_tokens": 16,
    }
    model = dataclasses.replace(footprint(fake_chain.record()), dense_bytes=dense)
    return plan_memory(model, max_context=256, host_memory=host_memory, **(arguments | options))


def test_without_a_budget_all_experts_may_be_resident() -> None:
    memory = plan(None)
    assert memory.expert_capacity_bytes == memory.expert_bytes == 5 * 4096
    assert memory.cache_pages == 2
    assert memory.cache_bytes == 2 * footprint(fake_chain.record()).cache_page_bytes


def test_a_page_holds_keys_and_values_of_all_layers() -> None:
    model = fake_chain.record()
    assert footprint(model).cache_page_bytes == 32 * 2 * (8 + 8) * 4
    latent = dataclasses.replace(model.attentions[0], latent=True)
    assert footprint(dataclasses.replace(model, attentions=(latent,))).cache_page_bytes == 32 * 2 * 8 * 4


def test_a_budget_is_kept_to_the_byte() -> None:
    least = plan(None).total_bytes - 3 * 4096
    for budget in range(least, least + 4 * 4096, 1111):
        memory = plan(budget)
        assert memory.total_bytes <= budget
        assert memory.expert_capacity_bytes >= 2 * 4096
    with pytest.raises(BudgetError, match=r"host_memory is 1 bytes too small"):
        plan(least - 1)


def test_the_cache_shrinks_to_leave_room_for_the_experts_of_a_token() -> None:
    full = plan(None, 10**6, cache_tokens=None)
    assert full.cache_pages == 2 * 256 // 32
    page = footprint(fake_chain.record()).cache_page_bytes
    least = full.dense_bytes + full.activation_bytes + full.table_bytes + 2 * 4096
    small = plan(least + 3 * page + 5, 10**6, cache_tokens=None)
    assert small.cache_pages == 3
    with pytest.raises(BudgetError, match="cache_tokens"):
        plan(least + page - 1, 10**6, cache_tokens=None)


def test_the_cache_takes_at_most_a_quarter_of_what_is_free() -> None:
    page = footprint(fake_chain.record()).cache_page_bytes
    assert plan(None, cache_tokens=None, available_bytes=20 * page).cache_pages == 5


def test_activations_grow_with_the_step() -> None:
    model = footprint(fake_chain.record())
    assert model.activation_bytes(64, 2) > model.activation_bytes(16, 2) > 16 * 16 * 4
