"""Guesses and pieces brought ahead, against a plain model of both: what is guessed, brought, taken and counted."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moec.artifacts.schedule import Policy
from moec.artifacts.words import ahead, slots
from moec.compiler.kernels.cuda.ahead.bring import bring
from moec.compiler.kernels.cuda.ahead.guess import check, guess
from moec.compiler.kernels.cuda.ahead.scores import score_early, score_votes
from moec.compiler.kernels.cuda.slots.assign import assign
from moec.compiler.kernels.cuda.slots.fetch import fetch
from moec.runtime.tensors import aligned_empty, aligned_zeros
from tests.kernels.cuda.test_slots import SECOND, STRIDE, Layer, residents
from tests.support.cuda_emulator import Emulated

FIRST = slots.pieces(SECOND)
PIECES = slots.expert_pieces(STRIDE, SECOND)


@cache
def kernels() -> Emulated:
    own = (score_early(), score_votes(), guess(), check(), bring(blocks=2))
    return Emulated(*own, assign(), fetch(blocks=3, ahead_blocks=2))


def aligned(array: NDArray[np.float32] | NDArray[np.int64] | NDArray[np.uint16]) -> NDArray[np.generic]:
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


class Ahead:
    """A layer with its block of words and its staging memory."""

    def __init__(self, layer: Layer, bound: int, top_k: int, hosted: NDArray[np.bool_] | None = None) -> None:
        self.layer, self.bound, self.top_k = layer, bound, top_k
        self.staging = aligned_zeros((max(1, bound) * slots.PIECE_BYTES,), np.uint8)
        self.words = aligned_zeros((ahead.ahead_words(layer.experts),), np.int64)
        self.words[[ahead.BOUND, ahead.STAGING, ahead.TOP_K]] = bound, self.staging.ctypes.data, top_k
        self.hosted = np.ones(layer.experts, np.bool_) if hosted is None else hosted
        homes = np.where(self.hosted, layer.part("home", layer.experts), 0)
        self.words[ahead.HOMES : ahead.HOMES + layer.experts] = homes

    def guess(self, scores: NDArray[np.float32]) -> None:
        kernels()(ahead.GUESS, aligned(scores), self.layer.state, self.words)
        kernels()(ahead.BRING, self.layer.state)

    def use(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        given, on_gpu, on_cpu = (aligned_empty(index.shape, np.int64) for _ in range(3))
        given[...] = index
        kernels()(ahead.CHECK, given, self.words)
        kernels()(slots.ASSIGN, given, self.layer.state, on_gpu, on_cpu)
        kernels()(slots.FETCH, self.layer.state)
        return on_gpu, on_cpu

    def count(self, word: int) -> int:
        return int(self.words[word])


def brought(own: Ahead, scores: NDArray[np.float32]) -> dict[int, int]:
    """A plain model: pieces of each expert that a guess by ``scores`` brings."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, : own.top_k]
    absent = own.layer.part("slot", own.layer.experts) < 0
    likeliest = [e for e in dict.fromkeys(order.T.ravel().tolist()) if absent[e] and own.hosted[e]]
    left, found = own.bound, {}
    for expert in likeliest[: slots.MOST_AHEAD]:
        found[expert] = min(left, PIECES)
        left -= found[expert]
    return {expert: count for expert, count in found.items() if count}


def part_bytes(count: int) -> int:
    first = min(count * slots.PIECE_BYTES, SECOND) if count <= FIRST else SECOND
    return first + min(max(0, count - FIRST) * slots.PIECE_BYTES, STRIDE - SECOND)


@given(data=st.data())
@settings(max_examples=40)
def test_random_steps_agree_with_a_plain_model(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 30), "experts")
    top_k, count = data.draw(st.integers(1, min(5, experts)), "top_k"), data.draw(st.integers(0, experts - 1))
    policy = Policy("lru", 0, 0, data.draw(st.sampled_from(["always", "better"])))
    with_guess, without = (Layer(experts, count, policy, stage_places=4) for _ in range(2))
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30), "seed"))
    own = Ahead(
        with_guess, data.draw(st.integers(0, 3 * PIECES), "bound"), top_k, random.random(experts) < 0.8
    )
    chosen = right = tokens_seen = exact = fetched = taken = 0
    for _ in range(data.draw(st.integers(1, 6), "steps")):
        tokens = int(random.integers(1, 9))
        scores = random.random((tokens, experts)).astype(np.float32)
        index = np.argsort(-scores - random.random(scores.shape), axis=1)[:, :top_k]
        guesses = random.random() < 0.8
        found: dict[int, int] = {}
        if guesses:
            found = brought(own, scores)
            own.guess(scores)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
            hit = (index[:, :, None] == best[:, None]).any(axis=2)
            chosen, right = chosen + hit.size, right + int(hit.sum())
            tokens_seen, exact = tokens_seen + tokens, exact + int(hit.all(axis=1).sum())
            fetched += sum(map(part_bytes, found.values()))
        own.use(index)
        without.use(index)
        fetches = int(with_guess.state[slots.FETCHES])
        sources = with_guess.state[slots.SOURCE : slots.SOURCE + fetches].tolist()
        home = with_guess.part("home", experts)
        taken += sum(part_bytes(count) for expert, count in found.items() if int(home[expert]) in sources)
        for name in ("slot", "uses", "last", "fetch"):
            np.testing.assert_array_equal(with_guess.part(name, experts), without.part(name, experts))
        for expert in np.unique(index).tolist():
            address = int(with_guess.part("table", experts)[expert])
            assert with_guess.bytes_at(address) == with_guess.host[expert].tobytes()
        arrived = with_guess.state[slots.ARRIVED : slots.ARRIVED + fetches].view(np.int32).reshape(-1, 2)
        assert arrived.tolist() == [[FIRST, PIECES - FIRST]] * fetches
    counted = [
        own.count(word) for word in (ahead.CHOSEN, ahead.RIGHT, ahead.SEEN, ahead.EXACT, ahead.FETCHED)
    ]
    assert counted == [chosen, right, tokens_seen, exact, fetched]
    assert with_guess.state[slots.AHEAD_BYTES] == taken


@given(data=st.data())
@settings(max_examples=40)
def test_the_cpu_has_its_share_and_nothing_that_is_there_whole(data: st.DataObject) -> None:
    experts, top_k = data.draw(st.integers(4, 30), "experts"), data.draw(st.integers(1, 4), "top_k")
    share = tuple(
        data.draw(st.integers(0, misses), f"share of {misses}") for misses in range(slots.MOST_SHARED + 1)
    )
    layer = Layer(experts, data.draw(st.integers(0, experts - 1), "slots"), stage_places=32, share=share)
    own = Ahead(layer, data.draw(st.integers(0, 2 * PIECES), "bound"), top_k)
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30), "seed"))
    for _ in range(data.draw(st.integers(1, 6), "steps")):
        scores = random.random((int(random.integers(1, 9)), experts)).astype(np.float32)
        index = np.argsort(-scores - random.random(scores.shape), axis=1)[:, :top_k]
        found = brought(own, scores)
        own.guess(scores)
        resident = layer.part("slot", experts) >= 0
        on_gpu, on_cpu = own.use(index)
        np.testing.assert_array_equal(np.maximum(on_gpu, on_cpu), index)
        assert (np.minimum(on_gpu, on_cpu) == -1).all()
        theirs = set(on_cpu[on_cpu >= 0].tolist())
        missing = {expert for expert in np.unique(index).tolist() if not resident[expert]}
        begun = missing & set(found)
        whole = {expert for expert in begun if found[expert] == PIECES}
        wanted = share[min(slots.MOST_SHARED, len(missing - whole))]
        clock = int(layer.state[slots.CLOCK])
        wanted = min(wanted, len(missing - whole))
        in_turn = wanted == len(missing - whole) and clock % slots.LEARN_TOKENS < len(index)
        assert len(theirs) == max(0, wanted - in_turn)
        assert not theirs & whole
        assert not theirs & begun or theirs >= missing - begun, "what was begun goes last"
        for expert in set(np.unique(index).tolist()) - theirs:
            address = int(layer.part("table", experts)[expert])
            assert layer.bytes_at(address) == layer.host[expert].tobytes()


def lru(count: int, experts: int = 8, **options: object) -> Layer:
    return Layer(experts, count, Policy("lru", 0, 0, "always"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", [1, FIRST + 1, PIECES, PIECES + 2])
def test_a_fetch_takes_what_was_brought_from_where_it_is(bound: int) -> None:
    layer = lru(3)
    own = Ahead(layer, bound, 2)
    own.guess(np.array([[0, 0.1, 0, 0, 0, 3, 2, 0]], np.float32))
    own.staging[:] ^= 255
    own.use(np.array([[6, 5]]))
    for expert, count in ((5, min(bound, PIECES)), (6, max(0, bound - PIECES))):
        found = np.frombuffer(layer.bytes_at(int(layer.part("table", 8)[expert])), np.uint8)
        size = part_bytes(count)
        first = min(size, SECOND)
        np.testing.assert_array_equal(found[:first], layer.host[expert][:first] ^ 255)
        np.testing.assert_array_equal(found[first:SECOND], layer.host[expert][first:SECOND])
        end = SECOND + max(0, size - SECOND)
        np.testing.assert_array_equal(found[SECOND:end], layer.host[expert][SECOND:end] ^ 255)
        np.testing.assert_array_equal(found[end:], layer.host[expert][end:])


def test_what_was_brought_for_a_step_is_not_taken_by_the_next_one() -> None:
    layer = lru(1)
    own = Ahead(layer, PIECES, 1)
    own.guess(np.eye(8, dtype=np.float32)[5:6])
    own.use(np.array([[6]]))
    own.staging[:] ^= 255
    own.use(np.array([[5]]))
    assert layer.bytes_at(int(layer.part("table", 8)[5])) == layer.host[5].tobytes()
    assert layer.state[slots.AHEAD_BYTES] == 0
    assert own.count(ahead.FETCHED) == STRIDE


@pytest.mark.parametrize(("bound", "shared"), [(1, [6, 7]), (PIECES, [6])])
def test_the_gpu_takes_first_what_was_begun(bound: int, shared: list[int]) -> None:
    """Of three misses the CPU has two, of two one; a whole expert is no miss for the link any more."""
    layer = lru(0, share=(0, 0, 1, 2, 2), stage_places=8)
    own = Ahead(layer, bound, 1)
    own.guess(np.eye(8, dtype=np.float32)[7:8] if bound > 1 else np.eye(8, dtype=np.float32)[5:6])
    on_gpu, on_cpu = own.use(np.array([[5, 7, 6]]))
    assert sorted(on_cpu[on_cpu >= 0].tolist()) == shared
    assert sorted(np.r_[on_gpu[on_gpu >= 0], on_cpu[on_cpu >= 0]].tolist()) == [5, 6, 7]
    assert layer.state[slots.CPU_MISSES] == len(shared)
    assert residents(layer) == [False] * 8


@pytest.mark.parametrize("hidden", [1, 8, 300])
def test_scores(hidden: int) -> None:
    random = np.random.default_rng(hidden)
    x = random.standard_normal((3, hidden)).astype(np.float32)
    bits = (random.standard_normal((9, hidden)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    scores = aligned_empty((3, 9), np.float32)
    kernels()(ahead.SCORE_EARLY, aligned(x), (aligned(bits), "bfloat16"), scores)
    router = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(scores, x @ router.T, rtol=1e-5, atol=1e-5)
    votes = random.random((5, 9)).astype(np.float32)
    kernels()(ahead.SCORE_VOTES, aligned(np.array([[0, 4], [3, -1], [2, 2]])), aligned(votes), scores)
    np.testing.assert_allclose(scores, [votes[0] + votes[4], votes[3], 2 * votes[2]], rtol=1e-6)
