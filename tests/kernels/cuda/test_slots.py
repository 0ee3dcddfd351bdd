"""The kernels of the expert cache in the emulator, held to the runtime's pure policy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moec.artifacts.schedule import DEFAULT_POLICY, Policy
from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.slots.assign import assign
from moec.compiler.kernels.cuda.slots.fetch import fetch
from moec.planning import policies
from moec.runtime.devices.cuda.offload.states import Places, fill_state
from moec.runtime.experts.slots import LayerSlots
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

    experts: int
    slot_count: int
    policy: Policy = DEFAULT_POLICY
    stage_places: int = 0
    order: tuple[int, ...] = ()
    use_shares: tuple[float, ...] = ()
    share: tuple[int, ...] = ()
    worth: int = -1

    def __post_init__(self) -> None:
        experts, slots = self.experts, self.slot_count
        order = self.order or tuple(range(experts))
        shares = self.use_shares or (0.0,) * experts
        self.at = words.state_words(experts, experts)
        self.host = aligned_empty((experts, STRIDE), np.uint8)
        self.host[:] = np.random.default_rng(experts).integers(0, 256, self.host.shape)
        self.slots = aligned_zeros((max(1, slots), STRIDE), np.uint8)
        self.slots[:slots] = self.host[list(order[:slots])]
        self.stage = aligned_zeros((max(1, self.stage_places), STRIDE), np.uint8)
        homes = self.host.ctypes.data + STRIDE * np.arange(experts)
        places = Places(self.slots.ctypes.data, self.stage.ctypes.data, self.stage_places, homes)
        self.state = aligned_zeros((self.at.size,), np.int64)
        fill_state(
            self.state,
            LayerSlots(experts, 1, STRIDE, SECOND, slots, experts, order, shares, self.share),
            self.policy,
            places,
        )
        self.state[words.WORTH] = self.worth

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
    return [slot >= 0 for slot in layer.part("slot", layer.experts).tolist()]


@given(data=st.data())
@settings(max_examples=80)
def test_random_steps_agree_with_the_policy(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 40), "experts")
    top_k, slots = data.draw(st.integers(1, min(6, experts)), "top_k"), data.draw(st.integers(0, experts - 1))
    name = data.draw(st.sampled_from(list(policies.SCORES)), "policy")
    half_life = 1 << data.draw(st.integers(1, 8), "half life") if name in policies.FADING else 0
    policy = Policy(
        name, data.draw(st.integers(0, 9)), half_life, data.draw(st.sampled_from(["always", "better"]))
    )
    order = data.draw(st.permutations(range(experts)), "order")
    shares = data.draw(st.lists(st.sampled_from([0.0, 0.03, 0.1, 0.25]), min_size=experts, max_size=experts))
    layer = Layer(experts, slots, policy, data.draw(st.integers(0, 8), "stage"), tuple(order), tuple(shares))
    state = policies.initial_state(policy, shares)
    resident = np.zeros(experts, np.bool_)
    resident[order[:slots]] = True
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30), "seed"))
    hits = misses = evictions = 0
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        tokens = int(random.integers(1, 9))
        index = np.argsort(random.random((tokens, experts)) * random.random(experts))[:, :top_k]
        index = np.where(random.random(index.shape) < 0.1, random.choice([-1, experts, 1 << 40]), index)
        ids, counts = first_choices(index, experts)
        policies.count(policy, state, (ids,), counts, tokens)
        keys = policies.keys(policy, state)
        taken = policies.replacements(policy, keys, resident, ids.tolist(), slots)
        hits, misses = hits + int(resident[ids].sum()), misses + int((~resident[ids]).sum())
        for expert, victim in taken:
            resident[expert] = True
            if victim is not None:
                resident[victim], evictions = False, evictions + 1
        on_gpu, on_cpu = layer.use(index)
        assert residents(layer) == resident.tolist()
        for part in ("uses", "last"):
            np.testing.assert_array_equal(layer.part(part, experts), getattr(state, part))
        check_step(layer, index, ids, on_gpu, on_cpu)
    counted = [int(layer.state[word]) for word in (words.HITS, words.MISSES, words.EVICTIONS)]
    assert counted == [hits, misses, evictions]
    owners = layer.part("owner", slots)
    assert sorted(expert for expert in owners.tolist() if expert >= 0) == np.flatnonzero(resident).tolist()


@given(data=st.data())
@settings(max_examples=60)
def test_random_steps_are_divided_as_the_policy_says(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 40), "experts")
    top_k, slots = data.draw(st.integers(1, min(6, experts)), "top_k"), data.draw(st.integers(0, experts - 1))
    name = data.draw(st.sampled_from(list(policies.SCORES)), "policy")
    half_life = 1 << data.draw(st.integers(1, 8), "half life") if name in policies.FADING else 0
    policy = Policy(name, 2, half_life, data.draw(st.sampled_from(["always", "better"])))
    margin = policies.worth_margin(policy, data.draw(st.sampled_from([0.0, 0.5, 1.5, 3.0]), "worth"))
    bulk = data.draw(st.integers(0, 2), "how much is the CPU's")
    shares = tuple(max(0, misses - 1 + min(bulk, 1)) if bulk else misses // 2 for misses in range(32))
    layer = Layer(experts, slots, policy, data.draw(st.integers(0, 8)), share=shares, worth=margin)
    state, resident = policies.initial_state(policy, [0.0] * experts), np.arange(experts) < slots
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30), "seed"))
    likely = random.random(experts)
    by_cpu = 0
    for _ in range(data.draw(st.integers(1, 20), "steps")):
        tokens = int(random.integers(1, 4))
        index = np.argsort(random.random((tokens, experts)) * likely)[:, :top_k]
        ids, counts = first_choices(index, experts)
        policies.count(policy, state, (ids,), counts, tokens)
        keys, in_turn = policies.keys(policy, state), state.clock % words.LEARN_TOKENS < tokens
        fetched, theirs = policies.divided(
            keys, resident, ids.tolist(), slots, shares, margin, in_turn=in_turn
        )
        here = [expert for expert in ids.tolist() if resident[expert]]
        for expert, victim in policies.replacements(policy, keys, resident, here + fetched, slots):
            resident[expert] = True
            if victim is not None:
                resident[victim] = False
        on_gpu, on_cpu = layer.use(index)
        assert set(on_cpu[on_cpu >= 0].tolist()) == set(theirs)
        np.testing.assert_array_equal(np.maximum(on_gpu, on_cpu), index)
        assert (np.minimum(on_gpu, on_cpu) == -1).all()
        assert residents(layer) == resident.tolist()
        by_cpu += len(theirs)
        assert layer.state[words.CPU_MISSES] == by_cpu


def check_step(
    layer: Layer,
    index: NDArray[np.int64],
    ids: NDArray[np.int64],
    on_gpu: NDArray[np.int64],
    on_cpu: NDArray[np.int64],
) -> None:
    """Every chosen expert can be read, everything has arrived, and what is there comes before what had to."""
    known = (index >= 0) & (index < layer.experts)
    np.testing.assert_array_equal(on_gpu, np.where(known, index, -1))
    assert (on_cpu == -1).all()
    for expert in ids.tolist():
        address = int(layer.part("table", layer.experts)[expert])
        assert layer.bytes_at(address) == layer.host[expert].tobytes()
    fetches = int(layer.state[words.FETCHES])
    arrived = layer.state[words.ARRIVED : words.ARRIVED + fetches].view(np.int32).reshape(-1, 2)
    both = [words.pieces(SECOND), words.pieces(STRIDE - SECOND)]
    assert arrived.tolist() == [both] * fetches
    fetch = layer.part("fetch", layer.experts)
    order = layer.state[words.ORDER : words.ORDER + index.size]
    assert sorted(order.tolist()) == list(range(index.size))
    flat = index.ravel()[order]
    numbers = [int(fetch[expert]) if 0 <= expert < layer.experts else -1 for expert in flat.tolist()]
    assert numbers == sorted(numbers)
    assert set(numbers) - {-1} == set(range(fetches))
    positions = layer.state[words.POSITION : words.POSITION + index.size]
    np.testing.assert_array_equal(order[positions], np.arange(index.size))


def layer_of(slots: int, experts: int = 8, **options: Any) -> Layer:
    return Layer(experts, slots, Policy("lru", 0, 0, "always"), **options)


def test_the_last_misses_are_the_cpus_and_take_no_slot() -> None:
    layer = layer_of(2, share=(0, 0, 1, 2, 2))
    on_gpu, on_cpu = layer.use(np.array([[0, 5, 6], [7, 5, 1]]))
    np.testing.assert_array_equal(on_gpu, [[0, 5, -1], [-1, 5, 1]])
    np.testing.assert_array_equal(on_cpu, [[-1, -1, 6], [7, -1, -1]])
    assert residents(layer) == [True, True, *[False] * 6]
    assert layer.state[words.CPU_MISSES] == 2
    assert layer.state[words.FETCHES] == 0


def test_what_only_the_cpu_computed_gets_a_slot_in_time() -> None:
    layer = layer_of(2, share=(0, 1, 2))
    for token in range(1, words.LEARN_TOKENS):
        layer.use(np.array([[6, 7]]))
        assert layer.state[words.CPU_MISSES] == 2 * token
    on_gpu, on_cpu = layer.use(np.array([[6, 7]]))
    assert (on_gpu.tolist(), on_cpu.tolist()) == ([[6, -1]], [[-1, 7]])
    assert residents(layer)[6]
    for _ in range(words.LEARN_TOKENS):
        layer.use(np.array([[6, 7]]))
    assert residents(layer)[6:] == [True, True]
    counted = int(layer.state[words.CPU_MISSES])
    layer.use(np.array([[6, 7]]))
    assert layer.state[words.CPU_MISSES] == counted


def test_what_is_used_more_than_who_leaves_is_fetched_though_the_cpu_would_compute_it() -> None:
    policy = Policy("lrfu", 0, 64, "always")
    layer = Layer(8, 2, policy, share=(0, 1, 2), worth=policies.worth_margin(policy, 1.5))
    for token, expected in enumerate(([-1, -1], [6, -1], [6, 7])):
        on_gpu, _ = layer.use(np.array([[6, 7]]))
        assert on_gpu.tolist() == [expected], token
    assert residents(layer)[6:] == [True, True]
    assert layer.state[words.CPU_MISSES] == 3


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
