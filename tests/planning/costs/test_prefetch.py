from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from moec.artifacts.schedule import Budgets
from moec.artifacts.traces import Traces, join_traces, layer_trace
from moec.artifacts.words.slots import PIECE_BYTES
from moec.planning.costs.prefetch import (
    GUESS_US,
    LayerGuess,
    _evaluate,
    _outcome,
    _times,
    layer_guesses,
    missing_recall,
)
from moec.planning.planner import plan, plan_analysed
from moec.planning.routing.analysis import analyse
from moec.planning.routing.guesses import SOURCES, Split, by_requests, by_router, by_transitions, halves
from moec.planning.routing.replay import stack_distances, stack_places
from tests.support.tiny_bundle import CPU, GPU, tiny_model, tiny_traces

MODEL = tiny_model(((8, 2, 200), (8, 2, 200)))


def following(tokens: int, *, early: bool = False) -> Traces:
    """Layer 1 always chooses what layer 0 chose, plus one; sequences of 20 tokens."""
    random = np.random.default_rng(0)
    first = np.array([random.permutation(8)[:2] for _ in range(tokens)])
    second = (first + 1) % 8
    starts = np.arange(0, tokens, 20)
    layers = layer_trace(8, first), layer_trace(8, second, early=second if early else None)
    return Traces(layers, starts.astype(np.int64), np.zeros(tokens, np.bool_))


def split_of(traces: Traces) -> Split:
    return halves(traces, np.arange(traces.tokens))[0]


def same(guessed: Any, chosen: Any) -> bool:
    return bool((np.sort(guessed, axis=1) == np.sort(chosen, axis=1)).all())


def test_transitions_find_what_always_follows() -> None:
    traces = following(200)
    split = split_of(traces)
    assert by_transitions(split, 0) is None
    guessed = by_transitions(split, 1)
    assert same(guessed, traces.layers[1].chosen[split.tokens])


def test_requests_find_the_sequence_of_the_same_kind() -> None:
    kinds = np.repeat(np.arange(8) % 2, 20)
    chosen = np.where(kinds[:, None] == 0, [[0, 1]], [[4, 5]])
    traces = Traces(
        (layer_trace(8, chosen), layer_trace(8, chosen + 2)),
        np.arange(0, 160, 20).astype(np.int64),
        np.zeros(160, np.bool_),
    )
    split = split_of(traces)
    guessed = by_requests(split, 1)
    assert guessed is not None
    # The first token of a sequence has no history: there popularity decides.
    later = split.tokens % 20 > 0
    assert same(guessed[later], (chosen + 2)[split.tokens][later])


def test_one_sequence_alone_is_like_no_other() -> None:
    traces = dataclasses.replace(following(100), sequence_starts=np.zeros(1, np.int64))
    assert by_requests(split_of(traces), 1) is None


def test_the_router_is_what_was_traced() -> None:
    traces = following(60, early=True)
    split = split_of(traces)
    assert by_router(split, 0) is None
    assert same(by_router(split, 1), traces.layers[1].chosen[split.tokens])


def test_no_half_learns_from_itself() -> None:
    traces = following(101)
    splits = list(halves(traces, np.arange(40, 101)))
    assert splits
    for split in splits:
        assert not set(split.tokens) & set(split.known)
        assert len(split.tokens) + len(split.known) == 101


def evaluate(bound: float, machine: Any, guessed: list[list[int]], absent: list[int]) -> Any:
    chosen = np.array([[0, 1]])
    missing = np.zeros((1, 8), np.bool_)
    missing[0, absent] = True
    from moec.artifacts.layout.footprint import footprint

    guess, facts = LayerGuess(1, chosen, np.array(guessed), missing), footprint(MODEL)
    times = _times(machine, facts, facts.layers[guess.layer], on_device=True)
    return _evaluate(_outcome(guess), times, bound)


def test_gain_is_what_is_not_waited_for_less_what_is_late() -> None:
    from moec.artifacts.layout.footprint import footprint

    size = footprint(MODEL).layers[0].expert_bytes / 1e6
    fast = dataclasses.replace(GPU, layer_us=1e3, handshake_us=1e6)
    slow = dataclasses.replace(fast, gpu_bandwidth_gb_s=1e6, layer_us=0.0)
    guessing = GUESS_US / 1000
    right = evaluate(2, fast, [[0, 1]], [0, 1])
    assert (right.fetched, right.wasted) == (2, 0)
    assert right.gain + guessing == pytest.approx(2 * size / 16)
    assert evaluate(1, fast, [[0, 1]], [0, 1]).gain + guessing == pytest.approx(size / 16)
    wrong = evaluate(2, fast, [[6, 7]], [0, 1, 6, 7])
    assert (wrong.fetched, wrong.wasted, wrong.gain) == (2, 2, -guessing)
    wrong, nothing_idles = (
        evaluate(2, slow, guess, [0, 1, 6, 7]).gain + guessing for guess in ([[6, 7]], [[0, 1]])
    )
    assert wrong == pytest.approx(-2 * size / 16, rel=0.01)
    assert nothing_idles == pytest.approx(0, abs=size / 100)
    assert evaluate(2, fast, [[0, 1]], []).fetched == 0, "what has a slot is not fetched"


def test_a_part_of_an_expert_gains_its_part() -> None:
    from moec.artifacts.layout.footprint import footprint

    size = footprint(MODEL).layers[0].expert_bytes / 1e6
    fast = dataclasses.replace(GPU, layer_us=1e3, handshake_us=1e6)
    half = evaluate(1.5, fast, [[7, 1]], [0, 1, 7])
    assert (half.fetched, half.wasted) == (1.5, 1.0), "the likelier one whole, and half of the other"
    assert half.gain + GUESS_US / 1000 == pytest.approx(0.5 * size / 16)


def test_recall_among_the_missing_leaves_out_what_has_a_slot() -> None:
    absent = np.zeros((2, 8), np.bool_)
    absent[:, [1, 2, 6]] = True
    guess = LayerGuess(1, np.array([[0, 1], [1, 2]]), np.array([[0, 6], [1, 0]]), absent)
    found = missing_recall([guess])
    assert (found.guessed, found.first_right) == (1 / 3, 0.5)
    assert missing_recall([dataclasses.replace(guess, absent=~absent)]).guessed == 1.0
    nothing = missing_recall([dataclasses.replace(guess, absent=np.zeros_like(absent))])
    assert (nothing.guessed, nothing.first_right) == (0, 0)


def test_a_schedule_follows_the_best_guess_where_it_can() -> None:
    traces = following(200, early=True)
    roomy = plan(traces, MODEL, Budgets(0, 1 << 22, 64, 8), CPU)
    assert roomy.prefetch.source == "none", "nothing is missing"
    budget = roomy.host.total - roomy.host.experts // 2
    tight = plan(traces, MODEL, Budgets(0, budget, 64, 8), CPU)
    assert tight.prefetch.source in ("router", "transitions")
    assert {each.source for each in tight.prefetch.candidates} == set(SOURCES)
    figures = {each.source: each for each in tight.prefetch.candidates}
    assert figures["router"].recall == figures["router"].exact_match == 1.0
    assert figures["router"].wasted_bytes_per_token == 0
    assert figures["requests"].recall < 0.6


def test_recorded_tokens_do_not_take_the_routers_guess_away() -> None:
    traced, recorded = following(200, early=True), following(100)
    joined = join_traces(traced, recorded)
    (guess,) = layer_guesses("router", joined, np.arange(20, 300), [np.ones((280, 8), np.bool_)] * 2)
    assert guess.layer == 1
    assert guess.chosen.shape == guess.guessed.shape == (180, 2)
    assert guess.absent.shape == (180, 8)
    assert same(guess.guessed, guess.chosen)
    assert layer_guesses("router", joined, np.arange(200, 300), [np.ones((100, 8), np.bool_)] * 2) == []
    roomy = plan(joined, MODEL, Budgets(0, 1 << 22, 64, 8), CPU)
    tight = plan(joined, MODEL, Budgets(0, roomy.host.total - roomy.host.experts // 2, 64, 8), CPU)
    assert {each.source for each in tight.prefetch.candidates} == set(SOURCES)


def test_a_gpu_brings_pieces_where_they_gain_more_than_guessing_costs() -> None:
    traces = following(200, early=True)
    budgets = Budgets(1 << 18, 1 << 22, 64, 8)
    slow_link = dataclasses.replace(GPU, link_gb_s=0.1, layer_us=1e3, handshake_us=1e6)
    gains, free = plan(traces, MODEL, budgets, slow_link).prefetch, plan(traces, MODEL, budgets, GPU).prefetch
    assert gains.source == "router"
    assert gains.bytes_per_layer % PIECE_BYTES == 0
    assert gains.bytes_per_layer > 0
    assert free.source == "none"
    assert free.candidates


def test_too_little_traced_is_no_plan() -> None:
    model = tiny_model()
    analysis = analyse(tiny_traces(model, tokens=40), model)
    schedule = plan_analysed(analysis, model, Budgets(0, 1 << 20, 64, 8), CPU)
    assert schedule.prefetch.candidates == ()
    one = tiny_model(((8, 2, 8),))
    assert plan(tiny_traces(one, tokens=200), one, Budgets(0, 1 << 20, 64, 8), CPU).prefetch.candidates == ()


def test_places_on_the_stack_are_the_distances_of_the_chosen() -> None:
    chosen = tiny_traces(tiny_model(), tokens=50).layers[0].chosen[None].astype(np.int64)
    order, shares = np.arange(8)[None], np.full((1, 8), 0.25)
    policy = analyse(None, tiny_model()).device.policy
    places = stack_places(policy, chosen, order, shares)
    assert (np.sort(places, axis=2) == np.arange(8)).all()
    assert (
        np.take_along_axis(places, chosen, axis=2) + 1 == stack_distances(policy, chosen, order, shares)
    ).all()
