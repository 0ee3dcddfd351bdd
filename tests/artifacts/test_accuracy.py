from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moec.artifacts.accuracy import Agreement, Comparison, add_comparison, read_accuracy
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.paths import ACCURACY_NAME
from moec.errors import BundleError, OutputError
from tests.support.tiny_bundle import make_bundle

AGREEMENT = Agreement(512, 0.99, 1e-3, 5e-3, 1e-2, 6.0, 6.1)
COMPARISON = Comparison("model", "a" * 64, "float32", "cpu", "shipped prompts", AGREEMENT)


def test_nothing_was_measured_of_a_new_bundle(tmp_path: Path) -> None:
    assert read_accuracy(open_bundle(make_bundle(tmp_path / "b"))).comparisons == ()


def test_the_same_comparison_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b")
    other = dataclasses.replace(COMPARISON, text="random tokens")
    later = dataclasses.replace(COMPARISON, agreement=dataclasses.replace(AGREEMENT, perplexity=6.2))
    for comparison in (COMPARISON, other, later):
        add_comparison(open_bundle(folder), comparison)
    assert read_accuracy(open_bundle(folder)).comparisons == (other, later)


def test_what_is_no_accuracy_is_refused(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b")
    add_comparison(open_bundle(folder), COMPARISON)
    bundle = open_bundle(folder)
    (folder / ACCURACY_NAME).write_text('{"comparisons": [{}]}')
    with pytest.raises(BundleError, match=ACCURACY_NAME):
        read_accuracy(bundle)


def test_a_bundle_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_bundle(tmp_path / "b")

    def fail(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(OutputError):
        add_comparison(open_bundle(folder), COMPARISON)
    monkeypatch.undo()
    assert ACCURACY_NAME not in open_bundle(folder).manifest.files
