"""Experts brought ahead of their router on the emulated GPU: the bits of a run without, and what is counted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import runtime
from moec.artifacts.files.reader import open_bundle
from moec.errors import BudgetError
from tests.support.cuda_stub import Stub
from tests.support.emulated_models import CACHE, PROMPTS, compiled, nothing_left, planned, rows
from tests.support.emulated_offload import budget, cut_step, host_budget, parts, planned_ahead, resident


@pytest.fixture(scope="module")
def bundle(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("ahead"), "bf16", torch.bfloat16)


@pytest.fixture(scope="module")
def expected(bundle: Path, stub: Stub) -> dict[str, Any]:
    return resident(bundle)


@pytest.fixture
def load(bundle: Path, stub: Stub) -> Iterator[Callable[..., runtime.Model]]:
    def load_it(**options: Any) -> runtime.Model:
        facts: dict[str, Any] = {"device": "cuda:0", "verify": "sizes", "cache_tokens": CACHE, "max_batch": 3}
        facts |= {"cpu_threads": 0, "max_step_tokens": 160, "prefetch": True} | options
        return runtime.load(bundle, **facts)

    yield load_it
    nothing_left(stub)


def test_bits_slots_and_misses_are_those_without(
    load: Callable[..., runtime.Model], expected: dict[str, Any], bundle: Path, stub: Stub
) -> None:
    extra = planned_ahead(bundle).size_bytes
    limit = budget(expected, 0.3, bundle) + extra
    with load(device_memory=limit) as model:
        assert planned(model).ahead == planned_ahead(bundle)
        slots = [layer.slots for layer in planned(model).slots.layers]  # type: ignore[union-attr]
        assert stub.counts().device_bytes == model.memory.total_bytes - planned(model).needs.code_bytes
        found = [rows(model, [PROMPTS[0]]) for _ in range(3)]
        together = rows(model, [list(prompt) for prompt in PROMPTS], max_new_tokens=6)
        stats, residents = model.stats, parts(model).slots.states.residents()
        counted = stats.hits, stats.misses, stats.evictions, stats.bytes_moved
        assert 0 < stats.prefetch.wasted_bytes < stats.prefetch.fetched_bytes, "nothing was taken"
        assert 0 < stats.prefetch.exact_match < stats.prefetch.recall <= 1
        assert stub.counts().graphs > 0
    assert found == [expected["one"]] * 3
    assert together == expected["three"]
    with load(device_memory=limit - extra, prefetch=False) as model:
        assert [layer.slots for layer in planned(model).slots.layers] == slots  # type: ignore[union-attr]
        for _ in range(3):
            rows(model, [PROMPTS[0]])
            gc.collect()  # nothing of the model before is needed
        rows(model, [list(prompt) for prompt in PROMPTS], max_new_tokens=6)
        assert (
            model.stats.hits,
            model.stats.misses,
            model.stats.evictions,
            model.stats.bytes_moved,
        ) == counted
        for own, theirs in zip(parts(model).slots.states.residents(), residents, strict=True):
            np.testing.assert_array_equal(own, theirs)
        assert model.stats.prefetch.tokens == 0


@pytest.mark.slow
def test_experts_in_the_file_are_not_brought_ahead(
    load: Callable[..., runtime.Model], expected: dict[str, Any], bundle: Path
) -> None:
    limits = {
        "device_memory": budget(expected, 0.3, bundle) + planned_ahead(bundle).size_bytes,
        "host_memory": host_budget(expected, 0.7, bundle),
    }
    with load(**limits) as model:
        assert [rows(model, [PROMPTS[0]]) for _ in range(2)] == [expected["one"]] * 2
        assert model.stats.prefetch.fetched_bytes > 0


@pytest.mark.slow
def test_a_step_that_ends_in_its_middle_leaves_nothing_that_is_taken(
    load: Callable[..., runtime.Model],
    expected: dict[str, Any],
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A guess is made, and the step ends before anything was brought for it."""
    files = open_bundle(bundle, verify="sizes")
    with load(device_memory=budget(expected, 0.3, bundle) + planned_ahead(bundle).size_bytes) as model:
        for fetch in range(2):
            cut_step(model, PROMPTS[fetch], fetch, files, monkeypatch)
        assert rows(model, [PROMPTS[0]]) == expected["one"]


@pytest.mark.slow
def test_it_is_off_where_nobody_asks_and_an_error_where_there_is_no_room(
    load: Callable[..., runtime.Model], expected: dict[str, Any], bundle: Path
) -> None:
    least = budget(expected, 0.0, bundle)
    with load(device_memory=least, prefetch=None) as model:
        assert planned(model).ahead is None
    with pytest.raises(BudgetError, match="device_memory is"):
        load(device_memory=least)
