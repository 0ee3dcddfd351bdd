"""Memory on the GPU and pinned memory of the host, each given back with its last reference."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.errors import BudgetError
from moec.runtime.device import ALIGNMENT_BYTES, padded_bytes
from moec.runtime.tensors import array_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.runtime.devices.cuda.driver.resources import Resources


class DeviceMemory:
    """Contiguous memory on the GPU (see `moec.runtime.device.Memory`).

    Raises:
        BudgetError: there is not so much.
    """

    __slots__ = ("_resources", "address", "size_bytes")

    def __init__(self, resources: Resources, size_bytes: int) -> None:
        self._resources = resources
        self.size_bytes = max(ALIGNMENT_BYTES, padded_bytes(size_bytes))
        self.address = 0
        self.address = resources.allocate(self.size_bytes)

    def __del__(self) -> None:
        self._resources.free(self.address)


class PinnedMemory:
    """Host memory that copies from and to the GPU run at full speed with, as bytes ``[size]``.

    Raises:
        BudgetError: the system does not give it.
    """

    __slots__ = ("_resources", "address", "bytes")

    def __init__(self, resources: Resources, size_bytes: int) -> None:
        self._resources = resources
        self.address = 0
        self.address = resources.pin(size_bytes)
        self.bytes: NDArray[Any] = array_at(self.address, np.uint8, (size_bytes,))

    def release(self) -> None:
        """Give it back now; nothing may look at ``bytes`` any more."""
        self._resources.unpin(self.address)

    def __del__(self) -> None:
        self.release()


HUGE_PAGE_BYTES = 2 << 20


class HostMemory:
    """Much host memory, in huge pages where the system has them; `pin` makes it readable by kernels and copies.

    An H100's driver pinned memory that was written before at 15 to 44 GB/s, and gave new pinned memory at 2.1 GB/s.

    Raises:
        BudgetError: the system does not give it.
    """

    __slots__ = ("_block", "_resources", "address", "bytes")

    def __init__(self, resources: Resources, size_bytes: int) -> None:
        self._resources = resources
        self.address = 0
        try:
            self._block = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES)
        except (OSError, OverflowError) as error:
            raise BudgetError(
                f"{size_bytes} bytes of host memory were refused.",
                f"{error}.",
                "Lower host_memory, or free memory.",
            ) from error
        self._block.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._block))
        self.address = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        self.bytes: NDArray[Any] = array_at(self.address, np.uint8, (size_bytes,))

    def pin(self) -> None:
        """Pin all of it, best after it was written.

        Raises:
            BudgetError: the system does not pin so much.
        """
        self._resources.register(self.address, self.bytes.size)

    def __del__(self) -> None:
        self._resources.unregister(self.address)
