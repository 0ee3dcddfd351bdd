"""Weights from files to the GPU: several threads read and hash, one copies.

Readers never talk to the driver, whose calls wait for each other. On an H100 one thread kept the link busy with pieces
of 4 MiB (53 of 55 GB/s), and sixteen read at 36 GB/s from memory; where each of the sixteen copied too they reached 41,
and 12 on a second machine with memory that was registered instead of allocated, which alone read at 47.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from moec.runtime.devices.cuda.driver.memory import PinnedMemory
from moec.runtime.devices.cuda.uploading.reading import Part, Reader, Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from moec.runtime.devices.cuda.driver.functions import Handle
    from moec.runtime.devices.cuda.driver.resources import Resources

PIECE_BYTES = 4 << 20
"""Of one read and one copy. All pieces together stay in the processor's cache, from where the GPU reads them."""
PART_BYTES = 64 << 20
"""A file that is not hashed is cut into parts of so many bytes, for different threads."""
MAX_READERS = 16
OTHER_THREADS = 2
"""CPUs left for the thread that copies and for the one that loads."""
SPARE_PIECES = 8
"""Beside one for each reader: they wait to be copied, or are being copied."""


@dataclass(frozen=True)
class WeightFile:
    """A file on its way to the GPU, or a run of its bytes."""

    name: str
    """Relative to the bundle."""
    address: int
    """Where it goes."""
    size_bytes: int
    sha256: str | None
    """What its bytes must hash to; ``None``: they are not hashed."""
    start: int = 0
    """Where in the file these bytes begin; 0 where they are hashed."""


class Filled(NamedTuple):
    """A piece that holds what is to be copied to ``address``."""

    piece: int
    address: int
    size_bytes: int


class Upload:
    """Whole files on their way to the GPU, from now on; `finish` or `abandon` must come.

    Args:
        resources: of the GPU; what is taken is given back at the end.
        folder: the bundle.
        files: what goes where. That memory must stay until the end.
        progress: told the bytes of each piece, from several threads.
        readers: how many threads read; ``None``: one a CPU but two, at most 16.
    """

    def __init__(
        self,
        resources: Resources,
        folder: Path,
        files: Sequence[WeightFile],
        progress: Callable[[int], None] | None = None,
        readers: int | None = None,
    ) -> None:
        parts = cut(files)
        count = max(1, min(len(parts), readers or _default_readers()))
        self._readers, self._stop = count, threading.Event()
        self._free: SimpleQueue[int | None] = SimpleQueue()
        self._filled: SimpleQueue[Filled | None] = SimpleQueue()
        self._memory = PinnedMemory(resources, PIECE_BYTES * (count + SPARE_PIECES))
        for piece in range(count + SPARE_PIECES):
            self._free.put(piece)
        queue, lock = iter(parts), threading.Lock()

        def take() -> Part | None:
            with lock:
                return next(queue, None)

        reader = Reader(folder, take, self._view, self._put, progress)
        self._pool = ThreadPoolExecutor(count + 1)
        work = [self._pool.submit(self._read, reader) for _ in range(count)]
        self._futures = [*work, self._pool.submit(self._copy, resources)]

    def finish(self) -> None:
        """Wait until all bytes are on the GPU.

        Raises:
            BundleError: a file is shorter than it should be, or of another SHA-256.
        """
        try:
            for future in self._futures:
                future.result()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Stop, and give everything back; nothing happens where all is over."""
        self._halt()
        self._pool.shutdown()
        self._memory.release()

    def _halt(self) -> None:
        """Let nobody wait for a piece any more."""
        self._stop.set()
        for _ in range(self._readers):
            self._free.put(None)

    def _read(self, reader: Reader) -> None:
        try:
            reader.run()
        except Stopped:
            return
        except BaseException:
            self._halt()
            raise
        finally:
            self._filled.put(None)

    def _view(self) -> tuple[int, memoryview]:
        """A free piece."""
        piece = self._free.get()
        if piece is None or self._stop.is_set():
            raise Stopped
        view: memoryview[Any] = self._memory.bytes.data[piece * PIECE_BYTES : (piece + 1) * PIECE_BYTES]
        return piece, view

    def _put(self, piece: int, address: int, size_bytes: int) -> None:
        self._filled.put(Filled(piece, address, size_bytes))

    def _copy(self, resources: Resources) -> None:
        try:
            resources.enter()
            copier = _Copier(resources, self._memory.address, self._free)
            try:
                copier.run(self._filled, self._readers)
            finally:
                copier.release()
        except BaseException:
            self._halt()
            raise


class _Copier:
    """One stream, in which pieces are copied and then free again."""

    def __init__(self, resources: Resources, address: int, free: SimpleQueue[int | None]) -> None:
        self._driver, self._address, self._free = resources.driver, address, free
        self._stream = self._driver.create_stream()
        self._copying: deque[tuple[int, Handle]] = deque()
        self._spare: list[Handle] = []
        self._events: list[Handle] = []

    def run(self, filled: SimpleQueue[Filled | None], readers: int) -> None:
        """Copy what is filled until each of the readers has put ``None``."""
        while readers:
            try:
                item = filled.get(block=not self._copying)
            except Empty:
                self._finish_first()
                continue
            if item is None:
                readers -= 1
                continue
            self._begin(item)
            while self._copying and self._driver.happened(self._copying[0][1]):
                self._finish_first()
        self._driver.synchronize(self._stream)

    def release(self) -> None:
        """Give the stream back, once nothing is in it, and all events."""
        self._driver.synchronize(self._stream)
        for event in self._events:
            self._driver.destroy_event(event)
        self._driver.destroy_stream(self._stream)

    def _begin(self, item: Filled) -> None:
        self._driver.copy_in(
            item.address, self._address + item.piece * PIECE_BYTES, item.size_bytes, self._stream
        )
        if not self._spare:
            self._spare.append(self._driver.create_event())
            self._events.append(self._spare[-1])
        event = self._spare.pop()
        self._driver.record(event, self._stream)
        self._copying.append((item.piece, event))

    def _finish_first(self) -> None:
        piece, event = self._copying.popleft()
        self._driver.wait(event)
        self._spare.append(event)
        self._free.put(piece)


def _default_readers() -> int:
    return min(MAX_READERS, (os.cpu_count() or 1) - OTHER_THREADS)


def cut(files: Sequence[WeightFile]) -> list[Part]:
    """Parts of files for different threads: the largest first, so that none is left with a long one at the end."""
    parts: list[Part] = []
    for file in files:
        step = max(1, file.size_bytes) if file.sha256 else PART_BYTES
        end = file.start + file.size_bytes
        parts += [
            Part(file.name, file.address - file.start, start, min(start + step, end), file.sha256)
            for start in range(file.start, end, step)
        ]
    return sorted(parts, key=lambda part: part.start - part.end)
