"""Steps that begin before the tokens in front of them are known: the same tokens, in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import runtime
from moec.artifacts.files.traces import load_traces
from moec.runtime import Request, Sampling
from moec.runtime.chain.executor import ChainExecutor
from moec.runtime.device import View
from tests.support.canaries import most_slow
from tests.support.cuda_stub import Stub
from tests.support.emulated_models import PROMPTS, compiled

PAGE = 32
Found = list[tuple[int, int]]
"""Sequence and token, in the order in which they came."""


@pytest.fixture(scope="module")
def bundle(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("model"), "f32", torch.float32)


@pytest.fixture
def load(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., runtime.Model]]:
    """``runtime.load`` on the GPU; ``ahead``: steps may run ahead."""

    def load_it(ahead: bool, **options: Any) -> runtime.Model:
        monkeypatch.undo()
        if not ahead:
            monkeypatch.setattr(ChainExecutor, "can_run_ahead", lambda *_: False)
        limits = {"cache_tokens": 16 * PAGE, "max_batch": 3, "max_step_tokens": 16}
        return runtime.load(bundle, **{"device": "cuda:0", "verify": "sizes", **limits, **options})

    yield load_it
    monkeypatch.undo()


def request(number: int, new: int, sampling: Sampling, **options: Any) -> Request:
    return Request(tuple(PROMPTS[number]), new, sampling=sampling, seed=number, **options)


def run(model: runtime.Model, arrivals: list[tuple[int, Request]]) -> Found:
    """Requests arrive at the step of their number."""
    engine, left, found, step = model.engine, list(arrivals), [], 0
    while engine.busy or left:
        while left and left[0][0] <= step:
            engine.add(left.pop(0)[1])
        found += [(output.sequence.id, output.token) for output in engine.step()]
        step += 1
    return found


SAMPLINGS = {
    "greedy": Sampling(),
    "drawn": Sampling(do_sample=True, temperature=0.9, top_k=30, top_p=0.95, repetition_penalty=1.4),
}


@pytest.mark.parametrize("name", most_slow(SAMPLINGS, ["drawn"]))
def test_tokens_and_their_order(load: Callable[..., runtime.Model], name: str) -> None:
    """Of different lengths: one at its last token holds the others back for one step."""
    lengths = (3, 18, 11)
    arrivals = [(0, request(number, new, SAMPLINGS[name])) for number, new in enumerate(lengths)]
    with load(ahead=False) as model:
        expected = run(model, arrivals)
    with load(ahead=True) as model:
        assert run(model, arrivals) == expected
        assert run(model, arrivals[1:2]) == [(key + 2, token) for key, token in expected if key == 1]


def test_one_step_is_in_front_of_the_host(load: Callable[..., runtime.Model], stub: Stub) -> None:
    with load(ahead=True) as model:
        run(model, [(0, request(1, 4, Sampling()))])
        model.engine.add(request(1, 20, Sampling()))
        model.engine.step()
        begun = stub.counts().launches
        model.engine.step()
        one = stub.counts().launches - begun
        model.engine.step()
        # What is waited for has run; what is begun waits in the stub's queue.
        assert stub.counts().launches - begun == 2 * one
        model.forward([[5]])
        assert stub.counts().launches - begun > 3 * one


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLINGS)
def test_ends_in_the_middle_and_arrivals(load: Callable[..., runtime.Model], name: str) -> None:
    """One ends by a token of its own: what ran ahead for it is dropped, and one that waited takes its place."""
    sampling = SAMPLINGS[name]
    with load(ahead=False) as model:
        alone = run(model, [(0, request(0, 20, sampling))])
    end = alone[7][1]
    arrivals = [
        (0, request(0, 20, sampling, eos_token_ids=frozenset({end}))),
        (0, request(1, 24, sampling, eos_token_ids=frozenset({end}), min_new_tokens=15)),
        (6, request(2, 12, sampling)),
        (6, request(0, 9, sampling)),
    ]
    found = []
    for ahead in (False, True):
        with load(ahead=ahead) as model:
            outputs = run(model, arrivals)
            found.append({key: [token for own, token in outputs if own == key] for key in range(4)})
    assert found[0] == found[1]
    assert found[1][0] == [token for _, token in alone][: len(found[1][0])]
    assert len(found[1][0]) <= 8


def test_scores_in_between_change_nothing(load: Callable[..., runtime.Model]) -> None:
    """They put other tokens where the next step would read those of the last one."""
    with load(ahead=True) as model:
        expected = [token for _, token in run(model, [(0, request(1, 12, Sampling()))])]
        sequence = model.engine.add(request(1, 12, Sampling()))
        while model.engine.busy:
            model.engine.step()
            model.forward([[5, 6]])
        assert sequence.new_tokens == expected


@pytest.mark.slow
def test_pages_run_out(load: Callable[..., runtime.Model]) -> None:
    found = []
    for ahead in (False, True):
        with load(ahead=ahead, cache_tokens=3 * PAGE) as model:
            outputs = run(model, [(0, request(number, 45, Sampling())) for number in range(2)])
            found.append(({key: [t for own, t in outputs if own == key] for key in range(2)}, model.stats))
    assert found[0][0] == found[1][0]
    assert found[0][1].preemptions == found[1][1].preemptions > 0


@pytest.mark.slow
def test_cancelled_sequences_leave_pages_that_others_take(load: Callable[..., runtime.Model]) -> None:
    with load(ahead=False) as model:
        expected = [token for _, token in run(model, [(0, request(2, 20, SAMPLINGS["drawn"]))])]
    with load(ahead=True, cache_tokens=3 * PAGE, max_batch=1) as model:
        engine = model.engine
        for turn in range(3):
            victim = engine.add(request(2, 30, SAMPLINGS["drawn"]))
            for _ in range(5 + turn):
                engine.step()
            engine.cancel(victim)
            assert engine.scheduler.pages.free == engine.scheduler.pages.total
            late = engine.add(request(2, 20, SAMPLINGS["drawn"]))
            while engine.busy:
                engine.step()
            assert late.new_tokens == expected


def test_routing_is_recorded_in_steps_that_run_ahead(
    load: Callable[..., runtime.Model], stub: Stub, tmp_path: Path
) -> None:
    """The traces that the host gets where it reads every layer; one sequence ends by a token of its own."""
    with load(ahead=True) as model:
        end = run(model, [(0, request(0, 10, Sampling()))])[5][1]
    arrivals = [
        (0, request(0, 20, Sampling(), eos_token_ids=frozenset({end}))),
        (0, request(1, 24, Sampling())),
        (6, request(2, 12, Sampling())),
    ]
    traces, outputs = [], []
    for logged in (False, True):
        path = tmp_path / f"{logged}.npz"
        with load(ahead=True) as model:
            run(model, [(0, request(1, 3, Sampling()))])
            if not logged:
                model._executor.sections[0].log = None  # type: ignore[union-attr]
            begun = stub.counts().graphs
            model.record_routing(path)
            outputs.append(run(model, arrivals))
            assert (stub.counts().graphs > begun) == logged
        traces.append(load_traces(path))
    assert sorted(outputs[0]) == sorted(outputs[1])
    read, kept = traces
    assert kept.sequence_starts.tolist() == read.sequence_starts.tolist()
    assert kept.prefill.tolist() == read.prefill.tolist()
    for mine, theirs in zip(kept.layers, read.layers, strict=True):
        np.testing.assert_array_equal(mine.chosen, theirs.chosen)
        assert mine.weights is not None
        assert theirs.weights is not None
        np.testing.assert_array_equal(mine.weights, theirs.weights)


def test_traces_begin_with_their_own_steps(load: Callable[..., runtime.Model]) -> None:
    """A step of somebody else is under way when recording begins."""
    with load(ahead=True) as model:
        expected = model.trace([PROMPTS[1]], 3)
        other = model.engine.add(request(0, 30, Sampling()))
        for _ in range(4):
            model.engine.step()
        found = model.trace([PROMPTS[1]], 3)
        assert found.tokens >= expected.tokens
        while model.engine.busy:
            model.engine.step()
        assert len(other.new_tokens) == 30


def seen_tokens(model: runtime.Model, row: int) -> set[int]:
    """Tokens whose bits the GPU has in a slot."""
    assert model._executor is not None
    sampler: Any = model._executor.sections[0].sampler
    words = sampler._device.read(View(sampler._seen.address, "int32", (sampler.rows, sampler._words)))
    return set(np.flatnonzero(np.unpackbits(words[row].view(np.uint8), bitorder="little")).tolist())


@pytest.mark.slow
def test_tokens_that_the_host_chooses_in_between_are_known_to_the_gpu(
    load: Callable[..., runtime.Model],
) -> None:
    """One that wants logprobs joins one with a penalty, whose bits of seen tokens the GPU keeps, and leaves it."""
    penalized = request(0, 16, Sampling(repetition_penalty=3.0))
    scored = request(1, 4, Sampling(), top_logprobs=2)
    with load(ahead=True) as model:
        alone = [token for _, token in run(model, [(0, penalized)])]
        scored_alone = [token for _, token in run(model, [(0, scored)])]
        engine = model.engine
        first, second, row = engine.add(penalized), None, -1
        outputs: list[runtime.TokenOutput] = []
        while engine.busy:
            if second is None and len(first.new_tokens) == 4:
                second = engine.add(scored)
            row = row if first.lease is None else first.lease.row
            outputs += engine.step()
        assert seen_tokens(model, row) == set(first.tokens)
        assert first.new_tokens == alone
        assert second is not None
        assert second.new_tokens == scored_alone
        logits = torch.from_numpy(model.forward(second.tokens)[0]).double().log_softmax(-1)
        own = [output.logprobs for output in outputs if output.sequence is second]
    start = len(scored.prompt) - 1
    for place, (token, logprobs) in enumerate(zip(scored_alone, own, strict=True), start):
        assert logprobs is not None
        assert logprobs.chosen == pytest.approx(float(logits[place][token]), abs=1e-3)
        assert [key for key, _ in logprobs.top] == logits[place].topk(2).indices.tolist()
    assert all(output.logprobs is None for output in outputs if output.sequence is first)
