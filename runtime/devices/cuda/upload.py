"""Weights from files to the GPU: read, hashed and copied at the same time by several threads."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.verify import damaged
from moec.runtime.devices.cuda.memory import PinnedMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from moec.runtime.devices.cuda.driver import Handle
    from moec.runtime.devices.cuda.resources import Resources

PIECE_BYTES = 8 << 20
"""Of one read and one copy."""
PART_BYTES = 512 << 20
"""A file that is not hashed is cut into parts of so many bytes, for different threads."""
MAX_THREADS = 16


@dataclass(frozen=True)
class WeightFile:
    """One file on its way to the GPU."""

    name: str
    """Relative to the bundle."""
    address: int
    """Where it goes."""
    size_bytes: int
    sha256: str | None
    """What its bytes must hash to; ``None``: they are not hashed."""


@dataclass(frozen=True)
class _Part:
    file: WeightFile
    start: int
    end: int


class _Lane:
    """A pinned buffer that is read into while another one is copied."""

    def __init__(self, resources: Resources, size_bytes: int) -> None:
        self._driver = resources.driver
        self.buffer = PinnedMemory(resources, size_bytes)
        self.done = resources.driver.create_event()

    def release(self) -> None:
        self.buffer.release()
        self._driver.destroy_event(self.done)


class _Stopped(Exception):  # noqa: N818 - it is no error
    """Another thread has failed."""


def upload(
    resources: Resources,
    folder: Path,
    files: Sequence[WeightFile],
    progress: Callable[[int], None] | None = None,
    threads: int | None = None,
) -> None:
    """Copy whole files to the GPU; returns when all bytes are there.

    Args:
        resources: of the GPU; pinned buffers are given back at the end.
        folder: the bundle.
        files: what goes where.
        progress: told the bytes of each piece, from several threads.
        threads: how many read; ``None``: one a CPU, at most 16.

    Raises:
        BundleError: a file is shorter than it should be, or of another SHA-256.
        BudgetError: there is no pinned memory for the buffers.
    """
    parts = _parts(files)
    count = max(1, min(len(parts), threads or min(MAX_THREADS, os.cpu_count() or 1)))
    queue, stop = iter(parts), threading.Event()
    lock = threading.Lock()

    def take() -> _Part | None:
        with lock:
            return next(queue, None)

    def work() -> None:
        try:
            _Worker(resources, folder, progress, stop).run(take)
        except _Stopped:
            return
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work) for _ in range(count)]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()


class _Worker:
    """One reading thread with its own stream and two buffers."""

    def __init__(
        self,
        resources: Resources,
        folder: Path,
        progress: Callable[[int], None] | None,
        stop: threading.Event,
    ) -> None:
        self._resources = resources
        self._folder = folder
        self._progress = progress
        self._stop = stop

    def run(self, take: Callable[[], _Part | None]) -> None:
        resources = self._resources
        resources.enter()
        stream = resources.driver.create_stream()
        lanes: list[_Lane] = []
        try:
            lanes += [_Lane(resources, PIECE_BYTES), _Lane(resources, PIECE_BYTES)]
            while (part := take()) is not None:
                self._copy(part, lanes, stream)
        finally:
            # Not left to the garbage collector: an exception keeps all of this alive as long as it lives itself.
            resources.driver.synchronize(stream)
            for lane in lanes:
                lane.release()
            resources.driver.destroy_stream(stream)

    def _copy(self, part: _Part, lanes: list[_Lane], stream: Handle) -> None:
        driver, file = self._resources.driver, part.file
        digest = hashlib.sha256() if file.sha256 else None
        with (self._folder / file.name).open("rb", buffering=0) as source:
            place, turn = part.start, 0
            while place < part.end:
                if self._stop.is_set():
                    raise _Stopped
                lane = lanes[turn]
                driver.wait(lane.done)
                view = lane.buffer.bytes.data[: min(PIECE_BYTES, part.end - place)]
                count = os.preadv(source.fileno(), [view], place)
                if count == 0:
                    raise damaged(self._folder, f"The file {file.name} ends after {place} bytes.")
                driver.copy_in(file.address + place, lane.buffer.address, count, stream)
                driver.record(lane.done, stream)
                if digest:
                    digest.update(view[:count])
                if self._progress:
                    self._progress(count)
                place, turn = place + count, 1 - turn
        if digest and digest.hexdigest() != file.sha256:
            raise damaged(
                self._folder, f"The file {file.name} was changed: its SHA-256 is {digest.hexdigest()}."
            )


def _parts(files: Sequence[WeightFile]) -> list[_Part]:
    """The largest first, so that no thread is left with a long file at the end."""
    parts: list[_Part] = []
    for file in files:
        step = max(1, file.size_bytes) if file.sha256 else PART_BYTES
        parts += [
            _Part(file, start, min(start + step, file.size_bytes))
            for start in range(0, file.size_bytes, step)
        ]
    return sorted(parts, key=lambda part: part.start - part.end)
