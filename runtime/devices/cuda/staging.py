"""What the host tells the GPU in each step, gathered in one pinned buffer and copied at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moec.runtime.device import padded_bytes
from moec.runtime.devices.cuda.driver.memory import DeviceMemory, PinnedMemory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from moec.runtime.devices.cuda.driver.functions import Handle
    from moec.runtime.devices.cuda.driver.resources import Resources


SMALL_BYTES = 64 << 10
"""Mirrors up to this size are copied as a whole, so that neighbours go in one copy."""


class StagedMirror:
    """A host array and its copy on the GPU (see `moec.runtime.device.Mirror`)."""

    __slots__ = ("_array", "_offset", "_staging", "_target", "address")

    def __init__(self, staging: Staging, array: NDArray[Any], offset: int) -> None:
        self._staging = staging
        self._array = array
        self._target: NDArray[Any] = (
            staging.bytes[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
        )
        self._offset = offset
        self.address = staging.address + offset

    def update(self, items: int | None = None, first: int = 0) -> None:
        """Take what the host has written into the next copy."""
        rows = slice(first, None if items is None else first + items)
        self._staging.begin_writing()
        self._target[rows] = self._array[rows]
        if self._array.nbytes <= SMALL_BYTES:
            self._staging.write(self._offset, padded_bytes(self._array.nbytes))
        else:
            begin = self._offset + first * self._array.strides[0]
            self._staging.write(begin, self._array[rows].nbytes)


class Staging:
    """One block of pinned memory and its copy on the GPU; what the host has written is copied before the next calls.

    Copies are asynchronous, so the host waits before it writes again until the last one is done: some microseconds
    after the tokens of the step in front of it were read, even if its own step runs by now.

    Args:
        resources: where memory comes from.
        stream: copies run in it.
        capacity_bytes: room for all mirrors.
    """

    def __init__(self, resources: Resources, stream: Handle, capacity_bytes: int) -> None:
        self._driver = resources.driver
        self._stream = stream
        self._pinned = PinnedMemory(resources, capacity_bytes)
        self._memory = DeviceMemory(resources, capacity_bytes)
        self._copied = resources.event()
        self._used = 0
        self._written: list[tuple[int, int]] = []
        self.address = self._memory.address
        self.bytes = self._pinned.bytes
        self.bytes[:] = 0

    def mirror(self, array: NDArray[Any]) -> StagedMirror:
        """Give an array its place in the block."""
        offset = self._used
        self._used += padded_bytes(array.nbytes)
        assert self._used <= self.bytes.size, "the staging block was planned too small"
        assert array.flags.c_contiguous
        return StagedMirror(self, array, offset)

    def begin_writing(self) -> None:
        """Wait, where nothing was written since the last copy, until that has been done."""
        if not self._written:
            self._driver.wait(self._copied)

    def write(self, begin: int, size_bytes: int) -> None:
        """Note a part that the host has written; `begin_writing` came before."""
        self._written.append((begin, begin + size_bytes))

    def copy(self) -> None:
        """Put what was written into the stream, neighbours in one copy."""
        if not self._written:
            return
        for begin, end in joined(self._written):
            self._driver.copy_in(
                self.address + begin, self._pinned.address + begin, end - begin, self._stream
            )
        self._driver.record(self._copied, self._stream)
        self._written.clear()


def joined(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Parts from begin to end, in order, those that touch as one."""
    result: list[tuple[int, int]] = []
    for begin, end in sorted(parts):
        if result and begin <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((begin, end))
    return result


def as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of a C-contiguous array, without a copy."""
    assert array.flags.c_contiguous
    return array.reshape(-1).view(np.uint8)
