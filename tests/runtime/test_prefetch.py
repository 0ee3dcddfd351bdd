from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import pytest

from moec.artifacts.files.reader import open_bundle
from moec.artifacts.ids import LayerId
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.schedule import NO_PREFETCH, LayerProfile, PrefetchFigures, PrefetchPlan, RoutingProfile
from moec.artifacts.words.ahead import MOST_TOKENS, ahead_words, guessed_layers
from moec.artifacts.words.slots import MOST_AHEAD, PIECE_BYTES, expert_pieces
from moec.errors import RequestError
from moec.runtime.experts.ahead import plan_ahead
from moec.runtime.experts.prefetch import Prefetcher, by_router, by_transitions, make_prefetcher
from moec.runtime.routing.early_router import early_routers, likeliest, router_names
from moec.runtime.routing.recorder import SequenceRecorder
from moec.runtime.stats import Stats
from tests.support.tiny_bundle import H, make_bundle

PROFILE = RoutingProfile(
    "traced",
    4,
    1,
    (
        LayerProfile(LayerId(0), (0, 1, 2), (0.5, 0.3, 0.2), (0.0,) * 3, ((2, 0), (2,), ())),
        LayerProfile(LayerId(1), (0, 1, 2), (0.5, 0.3, 0.2), (0.0,) * 3, ()),
    ),
)
STATES = np.zeros((1, 4), np.float32)


def test_transitions_vote() -> None:
    guess = by_transitions(PROFILE, (2, 2))
    assert guess is not None
    found = guess(0, STATES, np.array([[0, 1]]))
    assert found is not None
    assert found.tolist() == [[2, 0]]
    empty = RoutingProfile("uniform", 0, 0, (PROFILE.layers[1],) * 2)
    assert by_transitions(empty, (2, 2)) is None


def test_the_next_router_speaks_early() -> None:
    router = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    guess = by_router((None, router), (1, 2))
    assert guess is not None
    found = guess(0, np.array([[2, 1], [-1, 3]], np.float32), np.array([[0], [0]]))
    assert found is not None
    assert found.tolist() == [[2, 0], [1, 2]]
    assert by_router((router, None), (1, 2)) is None
    assert likeliest(np.array([[1.0, 1.0, 2.0]], np.float32), 2).tolist() == [[2, 0]], (
        "ties: the lower number"
    )


def test_guesses_are_counted() -> None:
    stats = Stats()
    answers: list[Any] = [np.array([[3, 1], [3, 5]])]
    prefetcher = Prefetcher(lambda *_: answers[0], 2, 4, stats)
    chosen = np.array([[0, 1], [2, 3]])
    assert prefetcher.next_experts(0, STATES, chosen) == [3, 1, 5], "the likeliest of both tokens first"
    prefetcher.brought([3, 5], 100)
    prefetcher.check(1, np.array([[1, 3], [3, 4]]))
    counts = stats.prefetch
    assert (counts.chosen, counts.right, counts.tokens, counts.exact) == (4, 3, 2, 1)
    assert (counts.recall, counts.exact_match) == (0.75, 0.5)
    assert (counts.fetched_bytes, counts.wasted_bytes) == (200, 100)
    prefetcher.check(1, np.array([[1, 3], [3, 4]]))
    assert counts.tokens == 2, "a guess counts once"
    assert prefetcher.next_experts(1, STATES, chosen) == [], "there is no layer after the last"
    assert prefetcher.next_experts(0, STATES, np.zeros((9, 2), np.int64)) == [], "too many tokens"
    answers[0] = None
    assert prefetcher.next_experts(0, STATES, chosen) == []
    stats.reset()
    assert stats.prefetch.tokens == 0
    assert stats.to_dict()["prefetch"] == {
        "recall": 0.0,
        "exact_match": 0.0,
        "fetched_bytes": 0,
        "wasted_bytes": 0,
    }


def test_what_turns_it_on(tmp_path: Any) -> None:
    bundle, stats = open_bundle(make_bundle(tmp_path / "tiny.moec")), Stats()
    stride = bundle.expert_layout(LayerId(0)).stride_bytes
    on = PrefetchPlan("transitions", 2 * stride, (PrefetchFigures("transitions", 0.5, 0.2, 1.0, 1.0, 1.0),))
    assert make_prefetcher(bundle, NO_PREFETCH, None, stats) is None
    assert make_prefetcher(bundle, on, False, stats) is None
    planned, forced = (
        make_prefetcher(bundle, on, None, stats),
        make_prefetcher(bundle, NO_PREFETCH, True, stats),
    )
    assert planned is not None
    assert planned.limit == 2
    assert forced is not None
    assert forced.limit == 2, "top-k where the schedule says nothing"
    router = PrefetchPlan("none", 0, (PrefetchFigures("router", 0.9, 0.2, 1.0, 1.0, -1.0), *on.candidates))
    with pytest.raises(RequestError, match="nothing to guess by"):
        # The best guess would be the router's, and this model made by hand has none that can be told.
        make_prefetcher(bundle, router, True, stats)


def test_what_turns_it_on_on_a_gpu(tmp_path: Any) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "tiny.moec"))
    schedule, facts = bundle.schedule.schedules[0], footprint(bundle.model)
    on = PrefetchPlan("transitions", 2 * PIECE_BYTES, ())
    planned = dataclasses.replace(schedule, prefetch=on)
    off = dataclasses.replace(schedule, prefetch=NO_PREFETCH)
    assert plan_ahead(bundle, facts, planned, False) is None
    assert plan_ahead(bundle, facts, off, None) is plan_ahead(bundle, facts, None, None) is None
    found = plan_ahead(bundle, facts, planned, None)
    assert found is not None
    assert (found.source, found.pieces, found.asked) == ("transitions", 2, False)
    assert [(each.layer, each.before) for each in found.layers] == list(guessed_layers(bundle.model).items())
    unknown = plan_ahead(bundle, facts, None, True)
    assert unknown is not None
    whole = [expert_pieces(layer.stride_bytes, layer.second_bytes) for layer in facts.layers]
    assert unknown.pieces == MOST_AHEAD * max(whole), "no more than whole experts"
    assert unknown.asked


def test_memory_for_guesses_is_planned_to_the_byte(tmp_path: Any) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "tiny.moec"))
    found = plan_ahead(bundle, footprint(bundle.model), None, True)
    assert found is not None
    (layer,) = found.layers
    before, own = (bundle.model.experts[each].experts for each in (layer.before, layer.layer))
    sizes = 8 * ahead_words(own), 4 * MOST_TOKENS * own, 4 * before * own
    assert layer.weight is not None
    places = layer.words, layer.scores, layer.weight, found.block_bytes
    for size, place, end in zip(sizes, places, places[1:], strict=False):
        assert place % 256 == 0
        assert size <= end - place < size + 256
    assert found.size_bytes == found.block_bytes + found.pieces * PIECE_BYTES


def test_routers_of_a_model_made_by_hand(tmp_path: Any) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "tiny.moec"))
    # Its segments have one weight [H, H] each, and 8 and 6 experts.
    assert H not in (8, 6)
    assert router_names(bundle.model) == (None, None)
    assert early_routers(bundle) == (None, None)


def test_a_recorder_notes_what_the_next_router_says() -> None:
    router = np.array([[0, 1], [1, 0], [1, 1]], np.float32)
    recorder = SequenceRecorder((3, 3), (None, router))
    from moec.runtime.engine.scheduler import Chunk, StepPlan
    from moec.runtime.engine.sequence import Request, Sequence

    states = np.array([[2.0, 1.0], [1.0, 5.0]], np.float32)
    for layer in range(2):
        recorder.record(layer, np.array([[0, 1], [1, 2]]), np.ones((2, 2), np.float32))
        recorder.see(layer, states)
    sequence = Sequence(0, Request((1, 2), 4))
    recorder.end_step(StepPlan((Chunk(sequence, 0, 0, 2),), ()))
    traces = recorder.traces()
    assert traces.layers[0].early is None
    assert cast("Any", traces.layers[1].early).tolist() == [[2, 1], [2, 0]]
