from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from moec.runtime.loading import read_ahead
from moec.runtime.loading.read_ahead import ReadAhead
from tests.support.waiting import HANG_SECONDS

Calls = list[tuple[int, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Offset and passed bytes of each piece."""
    found: Calls = []
    send = os.sendfile

    def noting(out: int, file: int, start: int, count: int) -> int:
        found.append((start, send(out, file, start, count)))
        return found[-1][1]

    def on_disk(*_: object) -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "sendfile", noting)
    monkeypatch.setattr(os, "preadv", on_disk)
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 8192)
    return found


def test_every_byte_of_every_file_is_passed_over(tmp_path: Path, calls: Calls) -> None:
    for name, size in (("a", 20_000), ("b", 8192), ("c", 0)):
        (tmp_path / name).write_bytes(bytes(size))
    with ReadAhead(tmp_path, ["a", "b", "c"]) as ahead:
        for thread in ahead._threads:
            thread.join()
    assert sorted(calls) == [(0, 8192), (0, 8192), (8192, 8192), (16384, 3616)]


def test_nothing_is_begun_after_stop(tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "THREADS", 1)
    (tmp_path / "a").write_bytes(bytes(5 * 8192))
    inside, go_on = threading.Event(), threading.Event()
    noting = os.sendfile

    def waiting(out: int, file: int, start: int, count: int) -> int:
        inside.set()
        assert go_on.wait(HANG_SECONDS)
        return noting(out, file, start, count)

    monkeypatch.setattr(os, "sendfile", waiting)
    with ReadAhead(tmp_path, ["a"]) as ahead:
        assert inside.wait(HANG_SECONDS)
        ahead.stop()
        go_on.set()
    assert calls == [(0, 8192)]


def test_files_that_are_in_memory_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []
    asked: list[int] = []

    def in_memory(file: int, buffers: list[bytearray], place: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        asked.append(place)
        return 1

    (tmp_path / "a").write_bytes(bytes(20_000))
    monkeypatch.setattr(os, "sendfile", lambda *arguments: sent.append(arguments))
    monkeypatch.setattr(os, "preadv", in_memory)
    with ReadAhead(tmp_path, ["a"]) as ahead:
        for thread in ahead._threads:
            thread.join()
    assert asked == [19_999]
    assert not sent


@pytest.mark.parametrize("broken", ["stat", "preadv"])
def test_errors_are_left_to_those_who_read_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken == "preadv":
        (tmp_path / "a").write_bytes(b"weights")

        def refused(*_: object) -> int:
            raise OSError

        monkeypatch.setattr(os, "preadv", refused)
    with ReadAhead(tmp_path, ["a"]) as ahead:
        for thread in ahead._threads:
            thread.join(HANG_SECONDS)
            assert not thread.is_alive()
