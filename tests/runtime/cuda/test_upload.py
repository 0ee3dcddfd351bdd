from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from moec.errors import BundleError
from moec.runtime.devices.cuda import upload as uploading
from moec.runtime.devices.cuda.resources import Resources
from moec.runtime.devices.cuda.upload import WeightFile, upload
from tests.support.fake_driver import FakeDriver


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "PIECE_BYTES", 1000)
    monkeypatch.setattr(uploading, "PART_BYTES", 2500)


def prepare(tmp_path: Path, sizes: list[int], hashed: bool) -> tuple[FakeDriver, Resources, list[WeightFile]]:
    driver = FakeDriver()
    own = Resources(driver, 0)
    own.limit_bytes = 1 << 20
    files = []
    for number, size in enumerate(sizes):
        data = np.random.default_rng(number).bytes(size)
        (tmp_path / f"{number}.bin").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest() if hashed else None
        files.append(WeightFile(f"{number}.bin", own.allocate(max(1, size)), size, digest))
    return driver, own, files


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_all_bytes_arrive_and_are_counted(tmp_path: Path, hashed: bool, threads: int) -> None:
    driver, own, files = prepare(tmp_path, [1, 999, 1000, 7777, 12345, 0], hashed)
    seen: list[int] = []
    upload(own, tmp_path, files, seen.append, threads)
    for file in files[:-1]:
        assert driver.contents(file.address) == (tmp_path / file.name).read_bytes()
    assert sum(seen) == sum(file.size_bytes for file in files)
    assert max(seen) == 1000
    assert not driver.alive["pinned"]
    assert not driver.alive["stream"]
    assert not driver.alive["event"]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_changed_file_is_named(tmp_path: Path, threads: int) -> None:
    driver, own, files = prepare(tmp_path, [5000, 6000, 7000], hashed=True)
    path = tmp_path / "1.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=r"1\.bin was changed"):
        upload(own, tmp_path, files, threads=threads)
    assert not driver.alive["pinned"]
    assert not driver.alive["stream"]


def test_a_short_file_is_named(tmp_path: Path) -> None:
    driver, own, files = prepare(tmp_path, [5000], hashed=False)
    (tmp_path / "0.bin").write_bytes(bytes(4000))
    with pytest.raises(BundleError, match=r"0\.bin ends after 4000 bytes"):
        upload(own, tmp_path, files)
    assert not driver.alive["pinned"]


def test_a_buffer_is_not_read_into_before_its_copy_is_done(tmp_path: Path) -> None:
    """Two buffers take turns, each behind its own event."""
    driver, own, files = prepare(tmp_path, [5000], hashed=True)
    driver.log.clear()
    upload(own, tmp_path, files, threads=1)
    assert driver.log[2:-3] == ["wait", "copy_in", "record"] * 5
    assert driver.log[-3:] == ["synchronize", "free_pinned", "free_pinned"]
