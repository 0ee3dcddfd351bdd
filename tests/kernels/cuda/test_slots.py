"""The kernels of the expert cache in the emulator, held to the runtime's pure policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moec.artifacts import slots as words
from moec.compiler.kernels.cuda.slots.assign import assign
from moec.compiler.kernels.cuda.slots.fetch import fetch
from moec.runtime.residency import LayerPlan, Residency
from moec.runtime.tensors import aligned_empty, aligned_zeros
from tests.support.cuda_emulator import Emulated

STRIDE, SECOND = 3 * words.PIECE_BYTES + 4096, words.PIECE_BYTES + 512
"""Of an expert here, and where its second part begins: no multiples of a piece."""


@cache
def kernels() -> Emulated:
    return Emulated(assign(), fetch(blocks=3))


@dataclass
class Layer:
    """A layer's state, its experts in host memory, its slots and stage."""

    plan: LayerPlan
    policy: str
    stage_places: int = 0
    share: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        experts, slots = len(self.plan.order), self.plan.slots
        self.at = words.state_words(experts, slots)
        self.state = aligned_zeros((self.at.size,), np.int64)
        self.host = aligned_empty((experts, STRIDE), np.uint8)
        self.host[:] = np.random.default_rng(experts).integers(0, 256, self.host.shape)
        self.slots = aligned_zeros((max(1, slots), STRIDE), np.uint8)
        self.stage = aligned_zeros((max(1, self.stage_places), STRIDE), np.uint8)
        head = {
            words.EXPERTS: experts,
            words.SLOTS: slots,
            words.STRIDE: STRIDE,
            words.POLICY: words.POLICY_CODES[self.policy],
            words.SLOT_ADDRESS: self.slots.ctypes.data,
            words.STAGE_ADDRESS: self.stage.ctypes.data,
            words.STAGE_PLACES: self.stage_places,
            words.SECOND: SECOND,
        }
        for word, value in head.items():
            self.state[word] = value
        self.state[words.SHARE : words.SHARE + len(self.share)] = self.share
        self.part("home", experts)[:] = self.host.ctypes.data + STRIDE * np.arange(experts)
        self.part("table", experts)[:] = self.part("home", experts)
        self.part("slot", experts)[:] = -1
        self.part("uses", experts).view(np.float64)[:] = self.plan.prior_uses
        self.part("last", experts)[:] = self.policy != "lru"
        self.part("rank", experts)[list(self.plan.order)] = np.arange(experts)
        self.part("owner", slots)[:] = -1
        for slot, expert in enumerate(self.plan.order[:slots]):
            self.part("owner", slots)[slot], self.part("slot", experts)[expert] = expert, slot
            self.part("table", experts)[expert] = self.slots.ctypes.data + slot * STRIDE
            self.slots[slot] = self.host[expert]

    def part(self, name: str, size: int) -> NDArray[np.int64]:
        first = words.TABLE if name == "table" else getattr(self.at, name)
        return self.state[first : first + size]

    def use(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        given, on_gpu, on_cpu = (aligned_empty(index.shape, np.int64) for _ in range(3))
        given[...] = index
        kernels()(words.ASSIGN, given, self.state, on_gpu, on_cpu)
        kernels()(words.FETCH, self.state)
        return on_gpu, on_cpu

    def bytes_at(self, address: int) -> bytes:
        for memory in (self.host, self.slots, self.stage):
            start = address - memory.ctypes.data
            if 0 <= start < memory.nbytes:
                return memory.reshape(-1)[start : start + STRIDE].tobytes()
        raise AssertionError(f"{address} is no expert's address")


def first_choices(index: NDArray[np.int64], experts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    chosen = index[(index >= 0) & (index < experts)]
    ids = np.array(list(dict.fromkeys(chosen.tolist())), np.int64)
    return ids, np.array([(chosen == expert).sum() for expert in ids], np.int64)


def residents(layer: Layer) -> list[bool]:
    return [slot >= 0 for slot in layer.part("slot", len(layer.plan.order)).tolist()]


@given(data=st.data(), policy=st.sampled_from(["lru", "lfru"]))
@settings(max_examples=60, deadline=None)
def test_random_steps_agree_with_the_policy(data: st.DataObject, policy: Any) -> None:
    experts = data.draw(st.integers(2, 40), "experts")
    top_k = data.draw(st.integers(1, min(6, experts)), "top_k")
    slots = data.draw(st.integers(0, experts - 1), "slots")
    order = data.draw(st.permutations(range(experts)), "order")
    prior = data.draw(st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5]), min_size=experts, max_size=experts))
    plan = LayerPlan(STRIDE, slots, experts, tuple(order), tuple(prior))
    residency = Residency((plan,), policy)
    residency.seed()
    layer = Layer(plan, policy, data.draw(st.integers(0, 8), "stage"))
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30), "seed"))
    hits = misses = evictions = 0
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        tokens = int(random.integers(1, 9))
        index = np.argsort(random.random((tokens, experts)) * random.random(experts))[:, :top_k]
        index = np.where(random.random(index.shape) < 0.1, random.choice([-1, experts, 1 << 40]), index)
        ids, counts = first_choices(index, experts)
        change = residency.use(0, ids, counts, tokens)
        on_gpu, on_cpu = layer.use(index)
        kept = residency.resident[0].copy()
        kept[[expert for _, expert in residency._transient]] = False
        assert residents(layer) == kept.tolist()
        hits, misses = hits + len(ids) - len(change.missed), misses + len(change.missed)
        evictions += sum(expert in residency._plans[0].order for _, expert in change.evicted)
        for expert in ids:
            address = int(layer.part("table", experts)[expert])
            assert layer.bytes_at(address) == layer.host[expert].tobytes()
        known = (index >= 0) & (index < experts)
        np.testing.assert_array_equal(on_gpu, np.where(known, index, -1))
        assert (on_cpu == -1).all()
    assert (layer.state[words.HITS], layer.state[words.MISSES]) == (hits, misses)
    owners = layer.part("owner", slots)
    assert (
        sorted(expert for expert in owners.tolist() if expert >= 0)
        == np.flatnonzero(residents(layer)).tolist()
    )


def layer_of(slots: int, experts: int = 8, **options: Any) -> Layer:
    return Layer(LayerPlan(STRIDE, slots, 0, tuple(range(experts)), (0.0,) * experts), "lru", **options)


def test_the_last_misses_are_the_cpus_and_take_no_slot() -> None:
    layer = layer_of(2, share=[0, 0, 1, 2, 2])
    on_gpu, on_cpu = layer.use(np.array([[0, 5, 6], [7, 5, 1]]))
    np.testing.assert_array_equal(on_gpu, [[0, 5, -1], [-1, 5, 1]])
    np.testing.assert_array_equal(on_cpu, [[-1, -1, 6], [7, -1, -1]])
    assert residents(layer) == [True, True, *[False] * 6]
    assert layer.state[words.CPU_MISSES] == 2
    assert layer.state[words.FETCHES] == 0


def test_misses_without_a_slot_go_to_the_stage_and_the_rest_stay_where_they_are() -> None:
    layer = layer_of(1, stage_places=2)
    layer.use(np.array([[3, 4, 5, 6]]))
    table = layer.part("table", 8)
    assert layer.state[words.FETCHES] == 3
    assert table[3] == layer.slots.ctypes.data
    assert table[4:6].tolist() == [layer.stage.ctypes.data, layer.stage.ctypes.data + STRIDE]
    assert table[6] == layer.part("home", 8)[6]


def test_nothing_missing_fetches_nothing() -> None:
    layer = layer_of(3)
    layer.use(np.array([[0, 1], [2, 1]]))
    assert layer.state[words.FETCHES] == 0
    assert layer.state[words.HITS] == 3
    layer.use(np.array([[7, 1]]))
    assert layer.state[words.FETCHES] == 1
    layer.use(np.array([[7, 1]]))
    assert layer.state[words.FETCHES] == 0


@pytest.mark.parametrize("tokens", [1, 8])
def test_as_many_choices_as_there_may_be(tokens: int) -> None:
    experts, top_k = 300, words.MOST_ENTRIES // tokens
    layer = layer_of(256, experts=experts)
    index = np.stack([np.random.default_rng(n).permutation(experts)[:top_k] for n in range(tokens)])
    layer.use(index)
    for expert in np.unique(index).tolist():
        assert layer.bytes_at(int(layer.part("table", experts)[expert])) == layer.host[expert].tobytes()
