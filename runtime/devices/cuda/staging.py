"""What the host tells the GPU in each step, gathered in one pinned buffer and copied at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moec.runtime.devices.cuda.memory import DeviceMemory, PinnedMemory
from moec.runtime.devices.protocol import ALIGNMENT_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.runtime.devices.cuda.driver import Handle
    from moec.runtime.devices.cuda.resources import Resources


class StagedMirror:
    """A host array and its copy on the GPU (see `moec.runtime.devices.protocol.Mirror`)."""

    __slots__ = ("_array", "_staging", "_target", "address")

    def __init__(self, staging: Staging, array: NDArray[Any], offset: int) -> None:
        self._staging = staging
        self._array = array
        self._target: NDArray[Any] = (
            staging.bytes[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
        )
        self.address = staging.address + offset

    def update(self, items: int | None = None) -> None:
        """Take what the host has written into the next copy."""
        self._staging.begin_writing()
        if items is None:
            self._target[...] = self._array
        else:
            self._target[:items] = self._array[:items]


class Staging:
    """One block of pinned memory and its copy on the GPU, always copied as a whole.

    The copy is asynchronous, so the host waits before it writes again until the last one is done; after a step whose
    tokens were read that takes no time.

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
        self.address = self._memory.address
        self.bytes = self._pinned.bytes
        self.bytes[:] = 0
        self.dirty = False
        """Whether the host has written since the last copy."""

    def mirror(self, array: NDArray[Any]) -> StagedMirror:
        """Give an array its place in the block."""
        offset = self._used
        self._used += -(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        assert self._used <= self.bytes.size, "the staging block was planned too small"
        assert array.flags.c_contiguous
        return StagedMirror(self, array, offset)

    def begin_writing(self) -> None:
        """Wait, where nothing was written since the last copy, until that has been done."""
        if not self.dirty:
            self._driver.wait(self._copied)
            self.dirty = True

    def copy(self) -> None:
        """Put the copy into the stream; `copied` must follow, once it is there for good."""
        self._driver.copy_in(self.address, self._pinned.address, self._used, self._stream)

    def copied(self) -> None:
        """Note that a copy is in the stream."""
        self._driver.record(self._copied, self._stream)
        self.dirty = False


def as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of a C-contiguous array, without a copy."""
    assert array.flags.c_contiguous
    return array.reshape(-1).view(np.uint8)
