from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moec import schemas
from moec.artifacts.files import stamps
from moec.artifacts.files.reader import find_bundle, open_bundle, read_bundle, stamp
from moec.errors import BundleError
from tests.support.tiny_bundle import make_bundle

WEIGHTS = "weights/experts-00000.bin"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stamps, "SETTLED_NS", 0)
    return tmp_path / "cache"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny.moec")


def hashed_bytes(bundle: Path, verify: Any = "once") -> int:
    seen: list[int] = []
    open_bundle(bundle, verify=verify, progress=seen.append)
    return sum(seen)


def flip(path: Path) -> None:
    """Change a byte, at a time that the file's clock tells from that of the last change."""
    probe = path.parent / "probe"
    probe.touch()
    while probe.stat().st_ctime_ns == path.stat().st_ctime_ns:
        probe.touch()
    probe.unlink()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def sizes(bundle: Path, weights: bool) -> int:
    return sum(
        record.size_bytes
        for name, record in find_bundle(bundle).manifest.files.items()
        if weights or not name.startswith("weights/")
    )


def test_weights_are_hashed_once(bundle: Path) -> None:
    assert hashed_bytes(bundle) == sizes(bundle, weights=True)
    assert hashed_bytes(bundle) == sizes(bundle, weights=False)
    assert hashed_bytes(bundle, "full") == sizes(bundle, weights=True)
    assert find_bundle(bundle, "once").unhashed == frozenset()


def test_a_full_verification_counts_as_the_first_one(bundle: Path) -> None:
    hashed_bytes(bundle, "full")
    assert hashed_bytes(bundle) == sizes(bundle, weights=False)


def test_sizes_alone_vouch_for_no_weights(bundle: Path) -> None:
    open_bundle(bundle, verify="sizes")
    assert hashed_bytes(bundle) == sizes(bundle, weights=True)


def test_a_change_is_found_whenever_it_happens(bundle: Path) -> None:
    open_bundle(bundle, verify="once")
    flip(bundle / WEIGHTS)
    for _ in range(2):
        with pytest.raises(BundleError, match=f"{WEIGHTS} was changed"):
            open_bundle(bundle, verify="once")
    flip(bundle / WEIGHTS)
    assert hashed_bytes(bundle) > sizes(bundle, weights=False), "it is another file now"


def test_a_change_that_hides_its_time_is_found(bundle: Path) -> None:
    open_bundle(bundle, verify="once")
    before = (bundle / WEIGHTS).stat()
    flip(bundle / WEIGHTS)
    os.utime(bundle / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match=f"{WEIGHTS} was changed"):
        open_bundle(bundle, verify="once")


def test_small_files_are_always_hashed(bundle: Path) -> None:
    open_bundle(bundle, verify="once")
    flip(bundle / "model.json")
    with pytest.raises(BundleError, match=r"model\.json was changed"):
        open_bundle(bundle, verify="once")


def test_a_copy_is_another_bundle(bundle: Path, tmp_path: Path) -> None:
    open_bundle(bundle, verify="once")
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    assert hashed_bytes(copy) == sizes(bundle, weights=True)


def test_records_are_held_against_their_schemas_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    validate = schemas.validate

    def note(name: str, *rest: Any) -> None:
        names.append(name)
        validate(name, *rest)

    monkeypatch.setattr(schemas, "validate", note)
    open_bundle(bundle, verify="sizes")
    assert set(names) == {"manifest", "model", "packing", "program", "schedule"}
    names.clear()
    open_bundle(bundle, verify="once")
    assert names == []
    open_bundle(bundle, verify="full")
    assert set(names) == {"manifest", "model", "packing", "program", "schedule"}


def test_a_file_that_was_only_just_written_is_not_vouched_for(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamps, "SETTLED_NS", 3600 * 10**9)
    assert hashed_bytes(bundle) == hashed_bytes(bundle) == sizes(bundle, weights=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"moec": "0.0"}',
        '{"moec": "0.1.0", "files": 3}',
        '{"moec": "0.1.0", "files": {"a": 1}}',
    ],
)
def test_a_damaged_stamp_counts_for_nothing(bundle: Path, cache: Path, text: str) -> None:
    open_bundle(bundle, verify="once")
    (path,) = (cache / "verified").iterdir()
    path.write_text(text)
    assert hashed_bytes(bundle) == sizes(bundle, weights=True)


def test_a_cache_that_cannot_be_written_is_no_error(bundle: Path, cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    assert hashed_bytes(bundle) == hashed_bytes(bundle) == sizes(bundle, weights=True)


def test_without_its_own_variable_the_cache_is_where_the_system_has_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOEC_CACHE")
    for variables, folder in (
        ({"XDG_CACHE_HOME": str(tmp_path / "xdg")}, tmp_path / "xdg/moec"),
        ({"XDG_CACHE_HOME": "", "HOME": str(tmp_path / "home")}, tmp_path / "home/.cache/moec"),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        open_bundle(bundle, verify="once")
        assert len(list((folder / "verified").iterdir())) == 1


def test_only_what_was_hashed_is_vouched_for(bundle: Path) -> None:
    """A load that leaves experts in the file hashes and notes the other files alone."""
    dense = "weights/dense.safetensors"
    found = find_bundle(bundle, "once")
    read_bundle(found, weights_later=True)
    stamp(found, [dense])
    again = find_bundle(bundle, "once")
    assert again.unhashed == found.unhashed - {dense}
    stamp(again, [WEIGHTS])
    assert find_bundle(bundle, "once").unhashed == found.unhashed - {dense, WEIGHTS}
