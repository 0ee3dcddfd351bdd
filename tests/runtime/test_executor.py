from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from moec.artifacts.ids import ValueId
from moec.runtime.binding import bind, last_uses, value_slots
from moec.runtime.cache.storage import CacheStorage
from moec.runtime.engine import Engine, Limits, Request
from moec.runtime.executor import ChainExecutor, crossing_values
from moec.runtime.experts import ExpertStore
from moec.runtime.libraries import load_runtime
from moec.runtime.routing import RoutingRecorder
from moec.runtime.stats import Stats
from tests.support import fake_chain
from tests.support.expert_plans import uniform_plans
from tests.support.fake_chain import EXPERTS, TOP, VOCAB, FakeBundle, Weights, expected_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from moec.artifacts.reader import Bundle
    from moec.runtime.libraries import Functions

PAGE = 4096


class FakeFunctions:
    def get(self, name: str) -> Callable[..., Any]:
        return fake_chain.functions()[name]


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[Weights]:
    load_runtime(1)
    yield fake_chain.weights(tmp_path / "experts.bin")
    fake_chain.KEPT.clear()


def make_engine(weights: Weights, resident: int = EXPERTS, step: int = 16) -> tuple[Engine, ChainExecutor]:
    stats = Stats()
    view = np.asarray(weights.experts).view(np.uint8).reshape(EXPERTS, PAGE)
    store = ExpertStore([view], uniform_plans([(EXPERTS, TOP, PAGE)], resident * PAGE), stats)
    bundle = cast("Bundle", FakeBundle(weights))
    cache = CacheStorage(bundle.model.attentions, 16)
    executor = bind(bundle, cast("Functions", FakeFunctions()), cache, store, stats)
    return Engine(executor, Limits(4, step, 256, 16), VOCAB, stats), executor


def run(engine: Engine, prompts: list[list[int]], new: int) -> list[list[int]]:
    sequences = [engine.add(Request(tuple(prompt), new)) for prompt in prompts]
    while engine.busy:
        engine.step()
    return [sequence.new_tokens for sequence in sequences]


def greedy(prompt: list[int], weights: Weights, new: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(expected_logits(tokens, weights)[-1].argmax()))
    return tokens[len(prompt) :]


PROMPTS = [[1, 2, 3], [5] * 40, [7, 8, 9, 10] * 5, [11]]


def test_logits_at_all_positions_equal_the_direct_computation(weights: Weights) -> None:
    engine, _ = make_engine(weights, step=200)
    tokens = (np.arange(150) * 7 % VOCAB).tolist()
    logits = engine.score(tuple(tokens))
    np.testing.assert_allclose(logits, expected_logits(tokens, weights), rtol=2e-4, atol=2e-3)


def test_a_batch_of_different_lengths_gives_the_direct_computations_tokens(weights: Weights) -> None:
    engine, _ = make_engine(weights)
    assert run(engine, PROMPTS, 12) == [greedy(prompt, weights, 12) for prompt in PROMPTS]
    assert all(engine.stats.milliseconds[stage] > 0 for stage in ("segments", "attention", "experts"))


def test_a_budget_of_top_k_experts_gives_the_same_logits_bit_for_bit(weights: Weights) -> None:
    tokens = tuple((np.arange(60) * 5 % VOCAB).tolist())
    free, small = make_engine(weights)[0], make_engine(weights, resident=TOP)[0]
    np.testing.assert_array_equal(small.score(tokens), free.score(tokens))
    assert free.stats.misses == EXPERTS
    assert free.stats.evictions == 0
    assert small.stats.evictions == small.stats.misses > 0
    assert small.stats.bytes_moved == (small.stats.misses + TOP) * PAGE


def test_hits_and_misses_are_distinct_experts_of_each_step(weights: Weights) -> None:
    engine, _ = make_engine(weights)
    run(engine, [[1, 2, 3]], 1)
    first = engine.stats.hits + engine.stats.misses
    assert engine.stats.hits == 0
    assert TOP <= first <= EXPERTS
    run(engine, [[1, 2, 3]], 1)
    assert engine.stats.misses == first
    assert engine.stats.hits == first


def test_prompt_chunks_without_wanted_rows_do_not_run_the_last_steps(weights: Weights) -> None:
    engine, executor = make_engine(weights, step=8)
    seen: list[int] = []
    last = executor._last[0]

    class Counting:
        stage = "segments"

        def run(self, frame: Any) -> None:
            seen.append(frame.count)
            last.run(frame)

    executor._last = cast("Any", [Counting()])
    run(engine, [[3] * 20], 2)
    assert seen == [1, 1]


def test_tracing_sees_every_token_in_order_however_sequences_are_batched(weights: Weights) -> None:
    engine, executor = make_engine(weights, step=8)
    recorder = RoutingRecorder((EXPERTS,))
    executor.recorder = recorder
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11, 12], [13] * 9]
    sequences = [engine.add(Request(tuple(prompt), 4)) for prompt in prompts]
    while engine.busy:
        engine.step()
        recorder.end_step(engine.last_plan)
    traces = recorder.traces()
    chosen = [expected_choices(sequence.tokens[:-1], weights) for sequence in sequences]
    np.testing.assert_array_equal(traces.layers[0].chosen, np.concatenate(chosen))
    prefill = [[True] * len(prompt) + [False] * 3 for prompt in prompts]
    assert traces.prefill.tolist() == np.concatenate(prefill).tolist()
    assert traces.sequence_starts.tolist() == [0, 13, 18]


def expected_choices(tokens: list[int], weights: Weights) -> Any:
    q, k, v = fake_chain.scatter(np.array(tokens), weights.embed)
    attended = np.stack([fake_chain.attend(q[n], k[: n + 1], v[: n + 1]) for n in range(len(tokens))])
    return fake_chain.route(attended, np.array(tokens), weights.embed)[1]


def test_values_are_freed_after_their_last_use_unless_they_cross_the_last_step() -> None:
    model = fake_chain.record()
    assert [sorted(names) for names in last_uses(model)] == [
        [],
        ["k", "q", "v"],
        ["a"],
        ["index", "weight"],
        [],
    ]
    assert crossing_values(model) == [ValueId("e"), ValueId("h")]
    assert value_slots(model)[ValueId("tokens")] == 0
