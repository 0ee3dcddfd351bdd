from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.artifacts.files.traces import load_traces, save_traces
from moec.artifacts.traces import Traces
from moec.errors import BundleError, OutputError
from moec.runtime.engine.scheduler import Chunk, StepPlan
from moec.runtime.engine.sequence import Request, Sequence
from moec.runtime.recording import Recording
from moec.runtime.routing.ring import RoutingRing, read_earlier, write_traces
from tests.support.tiny_bundle import tiny_model, tiny_traces

LAYERS = tiny_model().experts


def sequence(number: int, prompt: int) -> Sequence:
    return Sequence(number, Request((1,) * prompt, 8))


def choice(layer: int, number: int, position: int) -> list[int]:
    """What a token chose, made up so that every token is told apart."""
    experts, top_k = LAYERS[layer].experts, LAYERS[layer].top_k
    return [(7 * number + position + place) % experts for place in range(top_k)]


def step(ring: RoutingRing, *pieces: tuple[Sequence, int, int]) -> None:
    """Run (sequence, first position, tokens) in one step."""
    for layer in range(len(LAYERS)):
        rows = [choice(layer, seq.id, start + row) for seq, start, count in pieces for row in range(count)]
        ring.record(layer, np.array(rows), np.ones((len(rows), LAYERS[layer].top_k), np.float32))
    ring.end_step(StepPlan(tuple(Chunk(seq, 0, start, count) for seq, start, count in pieces), ()))


def rows(traces: Traces, layer: int = 0) -> list[list[int]]:
    found: list[list[int]] = traces.layers[layer].chosen.tolist()
    return found


def test_sequences_come_apart_and_prompts_are_told() -> None:
    ring = RoutingRing(LAYERS, 32)
    one, other = sequence(5, 2), sequence(9, 3)
    step(ring, (one, 0, 2), (other, 0, 1))
    step(ring, (one, 2, 1), (other, 1, 2))
    step(ring, (other, 3, 1))
    traces = ring.traces()
    assert traces.sequence_starts.tolist() == [0, 3]
    assert traces.prefill.tolist() == [True, True, False, True, True, True, False]
    for layer in range(len(LAYERS)):
        expected = [choice(layer, 5, p) for p in range(3)] + [choice(layer, 9, p) for p in range(4)]
        assert rows(traces, layer) == expected


def test_a_token_that_was_recomputed_counts_once_with_its_latest_choice() -> None:
    ring = RoutingRing(LAYERS, 8)
    seq = sequence(0, 1)
    step(ring, (seq, 0, 1))
    step(ring, (seq, 1, 1))
    ring.record(0, np.array([[6, 7], [5, 4]]), np.ones((2, 2), np.float32))
    ring.record(1, np.array([[0], [1]])[:, : LAYERS[1].top_k], np.ones((2, 1), np.float32))
    ring.end_step(StepPlan((Chunk(seq, 0, 0, 2),), ()))
    assert rows(ring.traces()) == [[6, 7], [5, 4]]


def test_what_was_run_for_no_sequence_is_forgotten() -> None:
    ring = RoutingRing(LAYERS, 8)
    ring.record(0, np.array([[6, 7]]), np.ones((1, 2), np.float32))
    ring.end_step(StepPlan((), ()))
    step(ring, (sequence(0, 1), 0, 1))
    assert rows(ring.traces()) == [choice(0, 0, 0)]


def test_what_was_run_for_no_sequence_takes_no_other_tokens_place() -> None:
    ring = RoutingRing(LAYERS, 2)
    step(ring, (sequence(0, 1), 0, 2))
    ring.record(0, np.array([[6, 7]]), np.ones((1, 2), np.float32))
    ring.end_step(StepPlan((), ()))
    assert rows(ring.traces()) == [choice(0, 0, 0), choice(0, 0, 1)]


@settings(max_examples=40)
@given(capacity=st.integers(1, 12), counts=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_the_oldest_tokens_go_first(capacity: int, counts: list[int]) -> None:
    ring = RoutingRing(LAYERS, capacity)
    tokens = []
    for number, count in enumerate(counts):
        step(ring, (sequence(number, 1), 0, count))
        tokens += [choice(0, number, position) for position in range(count)]
    assert rows(ring.traces()) == tokens[-capacity:]


def test_an_earlier_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    earlier = tiny_traces(tiny_model(), tokens=10)
    save_traces(earlier, path)
    ring = RoutingRing(LAYERS, 12, read_earlier(path, LAYERS))
    assert rows(ring.traces()) == rows(earlier)
    assert ring.traces().prefill.tolist() == earlier.prefill.tolist()
    step(ring, (sequence(0, 1), 0, 4))
    write_traces(ring.traces(), path)
    again = load_traces(path)
    assert rows(again) == rows(earlier)[2:] + [choice(0, 0, position) for position in range(4)]
    assert again.sequence_starts.tolist() == [0, 3, 8]
    assert [each.name for each in tmp_path.iterdir()] == ["mine.npz"]


def test_another_file_leaves_the_first_one_with_what_was_kept_for_it(tmp_path: Path) -> None:
    executor: Any = SimpleNamespace(recorder=None)
    engine: Any = SimpleNamespace(observer=None, sources=SimpleNamespace(observer=None))
    recording = Recording(tiny_model(), engine, executor)
    one, other = tmp_path / "one.npz", tmp_path / "other.npz"
    for path, number in ((one, 0), (other, 1), (one, 2)):
        recording.begin(path, 16)
        step(executor.recorder, (sequence(number, 1), 0, 2))
    recording.save()
    assert rows(load_traces(one)) == [
        choice(0, number, position) for number in (0, 2) for position in range(2)
    ]
    assert rows(load_traces(other)) == [choice(0, 1, position) for position in range(2)]


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="in no folder"):
        read_earlier(tmp_path / "nowhere" / "t.npz", LAYERS)
    with pytest.raises(OutputError, match="too long"):
        read_earlier(tmp_path / ("t" * 300), LAYERS)
    save_traces(tiny_traces(tiny_model(((5, 2, 8),))), tmp_path / "other.npz")
    with pytest.raises(BundleError, match="another model"):
        read_earlier(tmp_path / "other.npz", LAYERS)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="could not be written"):
        write_traces(tiny_traces(tiny_model()), tmp_path / "taken")
    assert [each.name for each in tmp_path.glob("*.partial")] == []


def test_nothing_recorded_is_a_file_as_well(tmp_path: Path) -> None:
    write_traces(RoutingRing(LAYERS, 4).traces(), tmp_path / "t.npz")
    traces: Any = load_traces(tmp_path / "t.npz")
    assert traces.tokens == 0


def test_a_folder_that_cannot_be_written_is_found_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(OutputError, match="No permission"):
        read_earlier(tmp_path / "t.npz", LAYERS)
