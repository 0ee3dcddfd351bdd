"""The chain divided among devices, which are all the CPU here: what goes from one to the next is all they share."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from moec.artifacts.files.bundle import Bundle
from moec.artifacts.ids import LayerId
from moec.artifacts.layout.footprint import LOGIT_ROWS
from moec.artifacts.model import ModelRecord
from moec.artifacts.schedule import LayerProfile, RoutingProfile, ScheduleRecord
from moec.artifacts.sections import Section, cut_places, sections_of
from moec.runtime.cache.states import StateStorage
from moec.runtime.cache.storage import CacheStorage
from moec.runtime.chain.binding import Binder
from moec.runtime.chain.executor import ChainExecutor, Links
from moec.runtime.chain.section import ChainSection
from moec.runtime.device import Move
from moec.runtime.devices.cpu import CpuDevice
from moec.runtime.engine import Engine, Limits, Request
from moec.runtime.experts.calls import HostExperts
from moec.runtime.experts.tables import ExpertStore
from moec.runtime.machine.libraries import load_runtime
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.routing.recorder import SequenceRecorder
from moec.runtime.stats import Stats
from tests.support import fake_chain
from tests.support.expert_plans import LRU, uniform_plans
from tests.support.fake_chain import EXPERTS, TOP, VOCAB, FakeBundle, Weights, expected_logits

PAGE = 4096
PROFILE = RoutingProfile(
    "uniform", 0, 0, (LayerProfile(LayerId(0), (0, 1, 2, 3, 4), (0.4,) * 5, (0.4,) * 5, ()),)
)


@dataclass(frozen=True)
class DividedBundle:
    """A `FakeBundle` that sections can be made of."""

    model: ModelRecord
    schedule: ScheduleRecord
    dense: Any
    fake: FakeBundle

    def dense_view(self, name: str) -> Any:
        return self.fake.dense_view(name)


class MemoryLink:
    """Copies at once."""

    def __init__(self) -> None:
        self.carried: list[int] = []

    def carry(self, moves: Sequence[Move]) -> None:
        for move in moves:
            ctypes.memmove(move.target, move.source, move.size_bytes)
        self.carried.append(sum(move.size_bytes for move in moves))

    def settle(self) -> None:
        pass


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    load_runtime(1)
    return fake_chain.weights(tmp_path / "experts.bin")


def chain_section(section: Section, weights: Weights, stats: Stats, step: int) -> ChainSection:
    device, model = CpuDevice(), section.bundle.model
    view = np.asarray(weights.experts).view(np.uint8).reshape(EXPERTS, PAGE)
    layers = len(model.experts)
    plans = uniform_plans([(EXPERTS, TOP, PAGE)] * layers, EXPERTS * PAGE)
    experts = HostExperts(ExpertStore([view] * layers, plans, stats, LRU))
    attends = any(step.kind == "attention" for step in model.steps)
    cache = CacheStorage(device, model.attentions if attends else (), 16)
    binder = Binder(
        device,
        section,
        fake_chain.program(),
        cast("Any", FakeFunctions()),
        cache,
        StateStorage(device, (), 4),
        experts,
        step,
        min(step, LOGIT_ROWS),
    )
    return ChainSection(device, binder, experts, stats)


class FakeFunctions:
    def get(self, name: str) -> Any:
        return fake_chain.functions()[name]


def divided(
    weights: Weights, cuts: tuple[int, ...], step: int = 16
) -> tuple[Engine, ChainExecutor, list[MemoryLink]]:
    fake, stats = FakeBundle(weights), Stats()
    bundle = DividedBundle(fake.model, ScheduleRecord(PROFILE, ()), fake.dense, fake)
    sections = sections_of(cast("Bundle", bundle), cuts)
    links = [MemoryLink() for _ in cuts]
    running = [chain_section(section, weights, stats, step) for section in sections]
    executor = ChainExecutor(running, VOCAB, stats, Links(tuple(links)))
    return Engine(executor, Limits(4, step, 256, 16), Vocabulary(VOCAB), stats), executor, links


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
def test_a_divided_chain_computes_what_the_whole_does(weights: Weights, cuts: tuple[int, ...]) -> None:
    assert cut_places(fake_chain.record()) == [1, 2]
    engine, _, links = divided(weights, cuts)
    tokens = tuple((np.arange(50) * 7 % VOCAB).tolist())
    np.testing.assert_allclose(
        engine.score(tokens), expected_logits(list(tokens), weights), rtol=2e-4, atol=2e-3
    )
    heads = 4 * fake_chain.HEADS * fake_chain.WIDTH
    values = [3 if cut == 1 else 1 for cut in cuts]
    assert [link.carried[0] for link in links] == [16 * heads * count for count in values]
    prompts = [[1, 2, 3], [5] * 40, [7, 8, 9, 10] * 5, [11]]
    sequences = [engine.add(Request(tuple(prompt), 6)) for prompt in prompts]
    while engine.busy:
        engine.step()
    whole = divided(weights, ())[0]
    wanted = [whole.add(Request(tuple(prompt), 6)) for prompt in prompts]
    while whole.busy:
        whole.step()
    assert [each.tokens for each in sequences] == [each.tokens for each in wanted]


def test_routing_is_told_by_the_layers_number_in_the_whole(weights: Weights) -> None:
    engine, executor, _ = divided(weights, (2,))
    recorder = SequenceRecorder((EXPERTS,))
    executor.recorder, engine.observer = recorder, recorder.end_step
    engine.add(Request((1, 2, 3, 4, 5), 3))
    while engine.busy:
        engine.step()
    assert recorder.traces().tokens == 7
