from __future__ import annotations

import dataclasses
import time
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.artifacts.files.traces import load_traces, save_traces
from moec.artifacts.traces import (
    LayerTrace,
    Traces,
    ends_with,
    join_traces,
    last_tokens,
    layer_trace,
    quantize_weights,
    repeats,
)
from moec.errors import BundleError
from tests.support.tiny_bundle import tiny_model, tiny_traces

if TYPE_CHECKING:
    from pathlib import Path


def weights_of(layer: LayerTrace) -> Any:
    return None if layer.weights is None else layer.weights.tolist()


def same(a: Traces, b: Traces) -> bool:
    layers = zip(a.layers, b.layers, strict=True)
    return (
        all(
            one.experts == other.experts
            and one.chosen.dtype == other.chosen.dtype
            and np.array_equal(one.chosen, other.chosen)
            and weights_of(one) == weights_of(other)
            for one, other in layers
        )
        and np.array_equal(a.sequence_starts, b.sequence_starts)
        and np.array_equal(a.prefill, b.prefill)
        and (a.encoder is None) == (b.encoder is None)
        and (a.encoder is None or b.encoder is None or same(a.encoder, b.encoder))
    )


def test_round_trip_and_the_same_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = tiny_traces(tiny_model())
    save_traces(traces, tmp_path / "a.npz")
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.0)
    save_traces(traces, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert same(load_traces(tmp_path / "a.npz"), traces)


def sided(tokens: int, source_tokens: int) -> Traces:
    """A decoder's, and an encoder's of two layers over other tokens."""
    encoder = tiny_traces(tiny_model(), tokens=source_tokens)
    decoder = tiny_traces(tiny_model(), tokens=tokens)
    return dataclasses.replace(decoder, layers=decoder.layers[:1], encoder=encoder)


def test_an_encoders_traces_come_back_and_are_joined(tmp_path: Path) -> None:
    one, other = sided(6, 9), sided(4, 3)
    save_traces(one, tmp_path / "a.npz")
    assert same(load_traces(tmp_path / "a.npz"), one)
    both = join_traces(one, other)
    assert both.encoder is not None
    assert (both.tokens, both.encoder.tokens) == (10, 12)
    assert ends_with(both, other)
    assert not ends_with(both, dataclasses.replace(other, encoder=sided(4, 4).encoder))
    last = last_tokens(both, 5)
    assert last.encoder is not None
    assert (last.tokens, last.encoder.tokens) == (4, 3)


def test_damage_on_an_encoders_side_is_named(tmp_path: Path) -> None:
    found = arrays() | {
        f"encoder_{name}": array for name, array in arrays(prefill=np.zeros(3, np.bool_)).items()
    }
    np.savez(tmp_path / "t.npz", **found)
    with pytest.raises(BundleError, match="wrong type"):
        load_traces(tmp_path / "t.npz")


@settings(max_examples=30)
@given(experts=st.integers(1, 700), tokens=st.integers(0, 5), weighted=st.booleans(), seed=st.integers(0, 99))
def test_any_trace_comes_back(
    tmp_path_factory: pytest.TempPathFactory, experts: int, tokens: int, weighted: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    top_k = min(experts, 3)
    chosen = np.array([random.permutation(experts)[:top_k] for _ in range(tokens)]).reshape(tokens, top_k)
    weights = random.random((tokens, top_k)) if weighted else None
    starts = np.array([0] if tokens else [], np.int64)
    traces = Traces(
        (layer_trace(experts, chosen.astype(np.int64), weights),), starts, np.zeros(tokens, np.bool_)
    )
    path = tmp_path_factory.mktemp("traces") / "t.npz"
    save_traces(traces, path)
    assert same(load_traces(path), traces)
    assert traces.layers[0].chosen.itemsize == (1 if experts <= 256 else 2)


def test_weights_keep_their_ratios_to_8_bits() -> None:
    quantized = quantize_weights(np.array([[0.5, 0.25, 0.0], [0.0, 0.0, 0.0], [2.0, -1.0, 1.0]]))
    assert quantized.tolist() == [[255, 128, 0], [0, 0, 0], [255, 0, 128]]


def arrays(**changes: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "sequence_starts": np.array([0, 2], np.int64),
        "prefill": np.zeros(4, np.bool_),
        "experts": np.array([3], np.int64),
        "chosen_00000": np.array([[0, 1], [1, 2], [2, 0], [0, 1]], np.uint8),
        "weights_00000": np.zeros((4, 2), np.uint8),
    }
    return {name: array for name, array in (good | changes).items() if array is not None}


BAD: dict[str, dict[str, Any]] = {
    "sequence_starts is missing": {"sequence_starts": None},
    "prefill is missing": {"prefill": np.zeros(4, np.int64)},
    "do not begin": {"sequence_starts": np.array([1], np.int64)},
    "do not begin at": {"sequence_starts": np.array([], np.int64)},
    "not in order": {"sequence_starts": np.array([0, 2, 2], np.int64)},
    "in order": {"sequence_starts": np.array([0, 4], np.int64)},
    "0 experts": {"experts": np.array([0], np.int64)},
    "choices are missing": {"chosen_00000": None},
    "choices": {"chosen_00000": np.zeros((4, 2), np.int64)},
    "of the wrong type": {"chosen_00000": np.zeros((3, 2), np.uint8)},
    "expert 3 of 3": {"chosen_00000": np.array([[0, 3]] * 4, np.uint8)},
    "twice": {
        "chosen_00000": np.array([[1, 1]] * 4, np.uint8),
        "weights_00000": np.full((4, 2), 9, np.uint8),
    },
    "a token chose an expert twice": {
        "chosen_00000": np.array([[1, 1]] * 4, np.uint8),
        "weights_00000": None,
    },
    "its weights": {"weights_00000": np.zeros((4, 1), np.uint8)},
    "unknown array surprise": {"surprise": np.zeros(1)},
    "cannot be read": {"chosen_00000": np.array([[{}, 1]] * 4, object)},
}


def test_an_expert_comes_again_in_place_of_one_that_computes_nothing(tmp_path: Path) -> None:
    layer = layer_trace(
        8, [[3, 1, 3, 3], [5, 2, 7, 0], [6, 6, 6, 6]], [[0, 1, 2, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    )
    traces = Traces((layer,), np.zeros(1, np.int64), np.ones(3, np.bool_))
    save_traces(traces, tmp_path / "t.npz")
    assert same(load_traces(tmp_path / "t.npz"), traces)
    again = [[False, False, True, True], [False] * 4, [False, True, True, True]]
    assert repeats(layer.chosen).tolist() == again


@pytest.mark.parametrize("words", BAD)
def test_bad_traces(tmp_path: Path, words: str) -> None:
    np.savez(tmp_path / "t.npz", allow_pickle=True, **arrays(**BAD[words]))
    with pytest.raises(BundleError, match=words):
        load_traces(tmp_path / "t.npz")


def test_good_arrays_are_good(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", **arrays())
    assert load_traces(tmp_path / "t.npz").tokens == 4


def test_any_damage_is_a_bundle_error_or_changes_nothing_checked(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    save_traces(tiny_traces(tiny_model(), tokens=4), path)
    data = path.read_bytes()
    outcomes = set()
    for offset in range(0, len(data), 7):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :])
        try:
            load_traces(path)
            outcomes.add("read")
        except BundleError:
            outcomes.add("refused")
    assert "refused" in outcomes
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError):
        load_traces(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        load_traces(tmp_path / "none.npz")


def test_the_file_is_an_ordinary_npz(tmp_path: Path) -> None:
    save_traces(tiny_traces(tiny_model()), tmp_path / "t.npz")
    with zipfile.ZipFile(tmp_path / "t.npz") as archive:
        assert archive.testzip() is None
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(tmp_path / "t.npz") as file:
        assert file["chosen_00001"].shape == (40, 2)


def test_joined_traces_are_one_after_the_other() -> None:
    model = tiny_model()
    one, other = tiny_traces(model, tokens=20), tiny_traces(model, tokens=12, seed=3)
    joined = join_traces(one, other)
    assert joined.sequence_starts.tolist() == [0, 10, 20, 26]
    assert joined.tokens == 32
    assert ends_with(joined, other)
    assert not ends_with(joined, one)
    assert not ends_with(one, joined)
    assert same(last_tokens(joined, 12), other)
    bare = Traces(
        tuple(layer_trace(e.experts, e.chosen) for e in one.layers), one.sequence_starts, one.prefill
    )
    assert join_traces(bare, other).layers[0].weights is None


def test_the_last_tokens_begin_with_a_whole_sequence_where_one_fits(tmp_path: Path) -> None:
    traces = tiny_traces(tiny_model(), tokens=20)
    assert same(last_tokens(traces, 100), traces)
    assert last_tokens(traces, 15).tokens == 10
    cut = last_tokens(traces, 4)
    assert (cut.tokens, cut.sequence_starts.tolist()) == (4, [0])
    assert np.array_equal(cut.layers[0].chosen, traces.layers[0].chosen[-4:])
    save_traces(cut, tmp_path / "cut.npz")
    assert same(load_traces(tmp_path / "cut.npz"), cut)
    assert last_tokens(traces, 0).tokens == 0


def asked(traces: Traces) -> Traces:
    """The same, with what each router said early."""
    layers = tuple(dataclasses.replace(layer, early=layer.chosen[:, ::-1].copy()) for layer in traces.layers)
    return dataclasses.replace(traces, layers=layers)


def early_of(traces: Traces) -> list[int | None]:
    return [None if layer.early is None else len(layer.early) for layer in traces.layers]


def test_what_routers_said_early_stays_where_tokens_follow_of_which_they_were_not_asked(
    tmp_path: Path,
) -> None:
    one, other = tiny_traces(tiny_model(), tokens=20), tiny_traces(tiny_model(), tokens=12, seed=3)
    joined = join_traces(asked(one), other)
    assert early_of(joined) == [20, 20]
    assert early_of(join_traces(joined, asked(other))) == [20, 20], "there is a gap between them"
    assert early_of(join_traces(asked(one), asked(other))) == [32, 32]
    assert early_of(join_traces(one, asked(other))) == [None, None]
    save_traces(joined, tmp_path / "j.npz")
    again = load_traces(tmp_path / "j.npz")
    for layer, before in zip(again.layers, one.layers, strict=True):
        assert layer.early is not None
        assert np.array_equal(layer.early, before.chosen[:, ::-1])
    assert early_of(last_tokens(joined, 22)) == [10, 10]
    assert early_of(last_tokens(joined, 12)) == [None, None]
    longer = tuple(dataclasses.replace(layer, early=np.tile(layer.chosen, (2, 1))) for layer in one.layers)
    save_traces(dataclasses.replace(one, layers=longer), tmp_path / "l.npz")
    with pytest.raises(BundleError, match="said early"):
        load_traces(tmp_path / "l.npz")
