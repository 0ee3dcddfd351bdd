from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from moec.artifacts.layout.footprint import LOGIT_ROWS
from moec.artifacts.sections import whole_section
from moec.errors import DeviceError
from moec.runtime.cache.states import StateStorage
from moec.runtime.cache.storage import CacheStorage
from moec.runtime.chain.binding import Binder
from moec.runtime.chain.executor import ChainExecutor
from moec.runtime.chain.section import ChainSection
from moec.runtime.devices.cpu import CpuDevice
from moec.runtime.engine import Engine, Limits, Request
from moec.runtime.engine.batch import Piece, StepBatch
from moec.runtime.experts.calls import HostExperts
from moec.runtime.experts.tables import ExpertStore
from moec.runtime.machine.libraries import load_runtime
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.routing.recorder import SequenceRecorder
from moec.runtime.stats import Stats
from tests.support import fake_chain
from tests.support.expert_plans import LRU, uniform_plans
from tests.support.fake_chain import EXPERTS, TOP, VOCAB, FakeBundle, Weights, expected_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from moec.artifacts.files.bundle import Bundle

PAGE = 4096


class FakeFunctions:
    """Numpy functions, counted as they are called."""

    def __init__(self) -> None:
        self.called: Counter[str] = Counter()

    def get(self, name: str) -> Callable[..., Any]:
        function = fake_chain.functions()[name]

        def call(*arguments: Any) -> None:
            self.called[name] += 1
            function(*arguments)

        return call


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    load_runtime(1)
    return fake_chain.weights(tmp_path / "experts.bin")


def make_engine(
    weights: Weights, resident: int = EXPERTS, step: int = 16, functions: FakeFunctions | None = None
) -> tuple[Engine, ChainExecutor]:
    stats, device = Stats(), CpuDevice()
    view = np.asarray(weights.experts).view(np.uint8).reshape(EXPERTS, PAGE)
    plans = uniform_plans([(EXPERTS, TOP, PAGE)], resident * PAGE)
    experts = HostExperts(ExpertStore([view], plans, stats, LRU))
    bundle = cast("Bundle", FakeBundle(weights))
    cache = CacheStorage(device, bundle.model.attentions, 16)
    states = StateStorage(device, (), 4)
    rows = min(step, LOGIT_ROWS)
    program, given = fake_chain.program(), functions or FakeFunctions()
    binder = Binder(device, whole_section(bundle), program, given, cache, states, experts, step, rows)
    executor = ChainExecutor([ChainSection(device, binder, experts, stats)], VOCAB, stats)
    return Engine(executor, Limits(4, step, 256, 16), Vocabulary(VOCAB), stats), executor


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


def test_pages_that_a_device_was_not_shown_are_shown_with_the_next_step(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, executor = make_engine(weights)
    (section,) = executor.sections
    shown: list[list[int]] = []

    def cut_short(batch: StepBatch, rows: list[int], *, ahead: bool) -> None:
        shown.append(rows)
        if len(shown) == 1:
            raise KeyboardInterrupt
        ChainSection.show(section, batch, rows, ahead=ahead)

    monkeypatch.setattr(section, "show", cut_short)
    sequence = engine.add(Request((1, 2, 3), 5))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    while engine.busy:
        engine.step()
    row = shown[0]
    assert len(row) == 1
    assert shown == [row, row, *[[]] * 4]
    assert sequence.new_tokens == greedy([1, 2, 3], weights, 5)


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
    functions = FakeFunctions()
    engine, _ = make_engine(weights, step=8, functions=functions)
    run(engine, [[3] * 20], 2)
    assert functions.called["scatter"] == 4
    assert functions.called["project"] == 2


def test_more_rows_than_logits_are_made_of_at_once(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.runtime.chain.executor.LOGIT_ROWS", 3)
    engine, executor = make_engine(weights, step=16)
    batch = StepBatch(16, engine.scheduler.table)
    engine.scheduler.table.assign(0, 0, (5,))
    tokens = [2, 4, 6, 8, 10, 12, 14, 16]
    batch.fill([Piece(0, 0, tokens)], [0, 1, 2, 4, 5, 6, 7])
    found = executor.run(batch)
    np.testing.assert_allclose(found, expected_logits(tokens, weights)[batch.wanted], rtol=2e-4, atol=2e-3)


def test_calls_that_were_forgotten_are_bound_again(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, executor = make_engine(weights, step=16)
    batch = StepBatch(16, engine.scheduler.table)
    engine.scheduler.table.assign(0, 0, (5,))
    tokens = [(n * 7) % VOCAB for n in range(16)]
    expected = expected_logits(tokens, weights)
    monkeypatch.setattr("moec.runtime.chain.section.COUNTS_KEPT", 3)
    for count in (1, 2, 3, 4, 5, 16, 1, 2, 3, 4, 5, 16):
        batch.fill([Piece(0, 0, tokens[:count])], [count - 1])
        found = executor.run(batch)
        np.testing.assert_allclose(found[0], expected[count - 1], rtol=2e-4, atol=2e-3)


def test_tracing_sees_every_token_in_order_however_sequences_are_batched(weights: Weights) -> None:
    engine, executor = make_engine(weights, step=8)
    recorder = SequenceRecorder((EXPERTS,))
    executor.recorder, engine.observer = recorder, recorder.end_step
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11, 12], [13] * 9]
    sequences = [engine.add(Request(tuple(prompt), 4)) for prompt in prompts]
    while engine.busy:
        engine.step()
        engine.score((1, 2, 3))
    traces = recorder.traces()
    chosen = [expected_choices(sequence.tokens[:-1], weights) for sequence in sequences]
    np.testing.assert_array_equal(traces.layers[0].chosen, np.concatenate(chosen))
    prefill = [[True] * len(prompt) + [False] * 3 for prompt in prompts]
    assert traces.prefill.tolist() == np.concatenate(prefill).tolist()
    assert traces.sequence_starts.tolist() == [0, 13, 18]


def expected_choices(tokens: list[int], weights: Weights) -> Any:
    q, k, v = fake_chain.scatter(np.array(tokens), weights.embed)
    attended = np.stack([fake_chain.attend(q[n], k[: n + 1], v[: n + 1]) for n in range(len(tokens))])
    return fake_chain.route(fake_chain.combine(attended, np.array(tokens), weights.embed))[1]


def test_devices_are_closed_between_steps_also_by_another_thread(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon thread that generates goes on while the interpreter ends, which closes what is left open."""
    engine, executor = make_engine(weights)
    device, events = executor.sections[0].device, list[str]()
    monkeypatch.setattr(device, "close", lambda: events.append("closed"))
    run_part = ChainSection.run_part

    def slowly(section: ChainSection, *arguments: Any, **options: Any) -> None:
        run_part(section, *arguments, **options)
        if not events:
            events.append("in a step")
            closing.start()
            closing.join(0.1)
            events.append("step ends")

    monkeypatch.setattr(ChainSection, "run_part", slowly)
    closing = threading.Thread(target=executor.close)
    with pytest.raises(DeviceError, match="closed"):
        run(engine, [[1, 2, 3]], 4)
    closing.join()
    assert events == ["in a step", "step ends", "closed"]
