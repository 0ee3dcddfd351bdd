from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.errors import BudgetError, BundleError, DeviceError
from moec.runtime.devices.cuda.driver.functions import OutOfDeviceMemoryError
from moec.runtime.devices.cuda.driver.resources import Resources
from moec.runtime.devices.cuda.uploading import upload as uploading
from moec.runtime.devices.cuda.uploading.upload import Upload, WeightFile
from tests.support.fake_driver import FakeDriver

SIZES = [1, 999, 1000, 7777, 12345, 0]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "PIECE_BYTES", 1000)
    monkeypatch.setattr(uploading, "PART_BYTES", 2500)
    monkeypatch.setattr(uploading, "SPARE_PIECES", 2)


class Case:
    """Files of random bytes, and a GPU that they fit on."""

    def __init__(self, folder: Path, sizes: list[int], hashed: bool) -> None:
        self.folder, self.driver = folder, FakeDriver()
        self.resources = Resources(self.driver, 0)
        self.resources.limit_bytes = 1 << 20
        self.files = [self._file(number, size, hashed) for number, size in enumerate(sizes)]
        self.seen: list[int] = []

    def _file(self, number: int, size: int, hashed: bool) -> WeightFile:
        data = np.random.default_rng(number).bytes(size)
        (self.folder / f"{number}.bin").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest() if hashed else None
        return WeightFile(f"{number}.bin", self.resources.allocate(max(1, size)), size, digest)

    def start(self, readers: int = 2) -> Upload:
        return Upload(self.resources, self.folder, self.files, self.seen.append, readers)

    def run(self, readers: int = 2) -> None:
        self.start(readers).finish()

    def arrived(self) -> bool:
        return all(
            self.driver.contents(file.address)[: file.size_bytes] == (self.folder / file.name).read_bytes()
            for file in self.files
        )

    def given_back(self) -> bool:
        alive = self.driver.alive
        return not (alive["pinned"] or alive["stream"] or alive["event"] or self.resources.pinned_bytes)


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_all_bytes_arrive_and_are_counted(tmp_path: Path, hashed: bool, threads: int) -> None:
    case = Case(tmp_path, SIZES, hashed)
    case.run(threads)
    assert case.arrived()
    assert sum(case.seen) == sum(SIZES)
    assert case.given_back()


@pytest.mark.parametrize("hashed", [True, False])
def test_an_upload_that_is_abandoned_ends(tmp_path: Path, hashed: bool) -> None:
    case, threads = Case(tmp_path, [200_000], hashed), set(threading.enumerate())
    case.start().abandon()
    upload = case.start()
    upload.abandon()
    upload.abandon()
    assert set(threading.enumerate()) <= threads
    assert case.given_back()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_changed_file_is_named(tmp_path: Path, threads: int) -> None:
    case = Case(tmp_path, [5000, 6000, 7000], hashed=True)
    path = tmp_path / "1.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=r"1\.bin was changed"):
        case.run(threads)
    assert case.given_back()


def test_a_short_file_is_named(tmp_path: Path) -> None:
    case = Case(tmp_path, [2500, 2500], hashed=False)
    (tmp_path / "1.bin").write_bytes(bytes(1200))
    with pytest.raises(BundleError, match=r"1\.bin ends after 1200 bytes"):
        case.run()
    assert case.given_back()


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    case = Case(tmp_path, [2500, 2500], hashed=False)
    (tmp_path / "1.bin").unlink()
    with pytest.raises(BundleError, match=r"1\.bin cannot be read: No such file"):
        case.run()
    assert case.given_back()


def test_memory_that_cannot_be_pinned_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, [2500, 2500], hashed=False)

    def refuse(size_bytes: int) -> int:
        raise OutOfDeviceMemoryError

    monkeypatch.setattr(case.driver, "allocate_pinned", refuse)
    with pytest.raises(BudgetError, match="pinned host memory cannot be had"):
        case.run()
    assert case.given_back()


@pytest.mark.parametrize("function", ["copy_in", "create_stream"])
def test_a_gpu_that_fails_stops_the_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    case, threads = Case(tmp_path, [200_000], hashed=False), set(threading.enumerate())

    def fail(*arguments: object) -> None:
        raise DeviceError("The GPU failed.", "An illegal address.", "")

    monkeypatch.setattr(case.driver, function, fail)
    with pytest.raises(DeviceError, match="The GPU failed"):
        case.run()
    assert set(threading.enumerate()) <= threads
    assert case.given_back()


def test_a_piece_is_not_read_into_before_its_copy_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies run only when they are waited for, and their sources still hold what was read."""
    case = Case(tmp_path, [9000, 5000], hashed=False)
    driver, waiting = case.driver, list[Any]()
    copy = driver.copy_in

    def later(*arguments: Any) -> None:
        waiting.append(arguments)

    def run(_: object = None) -> None:
        copy(*waiting.pop(0))

    def run_all(_: object) -> None:
        while waiting:
            run()

    monkeypatch.setattr(driver, "copy_in", later)
    monkeypatch.setattr(driver, "happened", lambda event: False)
    monkeypatch.setattr(driver, "wait", run)
    monkeypatch.setattr(driver, "synchronize", run_all)
    case.run()
    assert case.arrived()
    assert case.given_back()
