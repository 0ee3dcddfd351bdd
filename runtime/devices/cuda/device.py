"""A GPU as the executor sees it: one stream, memory within a limit, copies through pinned memory, captured steps."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.errors import DeviceError
from moec.runtime.devices.cuda.driver.memory import DeviceMemory, PinnedMemory
from moec.runtime.devices.cuda.driver.resources import Resources, current
from moec.runtime.devices.cuda.graphs import CallList
from moec.runtime.devices.cuda.modules.module import load_functions
from moec.runtime.devices.cuda.results import Results
from moec.runtime.devices.cuda.staging import Staging, as_bytes
from moec.runtime.devices.cuda.unfinished import Unfinished
from moec.runtime.tensors import tensor_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from moec.runtime.device import Call, View
    from moec.runtime.devices.cuda.attended import Attendance, Runnable
    from moec.runtime.devices.cuda.driver.functions import Driver, Handle
    from moec.runtime.devices.cuda.modules.module import CudaFunctions
    from moec.runtime.devices.cuda.staging import StagedMirror
    from moec.runtime.stats import Stats

CUDA_DEVICE = 2
"""DLPack's device type."""
BOUNCE_BYTES = 4 << 20
"""Pinned memory that single reads and writes go through."""


def tvm_stream(ordinal: int, stream: Handle) -> None:
    """Have TVM launch in ``stream`` from now on, in this thread."""
    import tvm_ffi

    handle: Any = stream
    tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", ordinal), int(handle)).__enter__()


class CudaDevice:
    """See `moec.runtime.device.Device`.

    Args:
        driver: the CUDA driver.
        ordinal: the GPU's number.
        set_stream: tells TVM in which stream this thread launches.
    """

    kind = "cuda"

    def __init__(
        self,
        driver: Driver,
        ordinal: int,
        set_stream: Callable[[int, Handle], None] = tvm_stream,
    ) -> None:
        self.driver = driver
        self.ordinal = ordinal
        self.name = driver.device_name(ordinal)
        self.capability = driver.capability(ordinal)
        self.resources = Resources(driver, ordinal)
        self._reference = weakref.ref(self)
        self._finalizer = weakref.finalize(self, Resources.close, self.resources)
        self._set_stream = set_stream
        self._stream = self.resources.stream()
        self.attendances: list[Attendance] = []
        """The CPU's threads that have a part in steps, kept with what they watch."""
        self.complete: Callable[[Sequence[Call]], Sequence[Call]] | None = None
        """Adds to a list of calls what it has to end with, where some run in another stream."""
        self.unfinished = Unfinished()
        """What is to be put right where a step ended in its middle."""

    @property
    def bounce_address(self) -> int:
        """Of ``BOUNCE_BYTES`` of pinned memory that single reads and writes go through, free between them."""
        return self._bounce.address

    @property
    def stream(self) -> Handle:
        """Where calls are launched."""
        return self._stream

    def open(self, limit_bytes: int, staging_bytes: int, driver_bytes: int = 0) -> None:
        """Set the budget, and take what every copy needs.

        Args:
            limit_bytes: of device memory, hard.
            staging_bytes: room for all mirrors.
            driver_bytes: what the driver will take of the budget by itself, for code and graphs.

        Raises:
            BudgetError: the limit does not hold even these.
        """
        self.enter()
        self.resources.limit_bytes = limit_bytes
        self.resources.reserve(driver_bytes)
        self.staging = Staging(self.resources, self._stream, staging_bytes)
        self._bounce = PinnedMemory(self.resources, BOUNCE_BYTES)

    def close(self) -> None:
        """Give everything back. The device cannot be used any more."""
        if getattr(current, "device", None) is self._reference:
            current.device = None
        self._finalizer()
        # They know this device, and would keep it until Python looks for cycles.
        while self.attendances:
            self.attendances.pop().leave()
        self.complete = None
        self.unfinished.forget()

    def enter(self) -> None:
        """Make this GPU and its stream the calling thread's, for the driver and for TVM."""
        if getattr(current, "device", None) is not self._reference:
            self.resources.enter()
            self._set_stream(self.ordinal, self._stream)
            current.device = self._reference

    @contextmanager
    def launching_in(self, stream: Handle) -> Iterator[None]:
        """Launches of this thread go to another stream meanwhile."""
        self._set_stream(self.ordinal, stream)
        try:
            yield
        finally:
            self._set_stream(self.ordinal, self._stream)

    def load(self, folder: Path, files: Sequence[str]) -> CudaFunctions:
        """Load a target's module; its code enters the GPU as kernels are first launched."""
        self.enter()
        return load_functions(folder, tuple(files), self.capability)

    def allocate(self, size_bytes: int) -> DeviceMemory:
        """Memory full of zeros: a cache with rubbish in it could be infinite, and 0 times that is not 0.

        Raises:
            BudgetError: there is not so much, or not within the limit.
        """
        self.enter()
        memory = DeviceMemory(self.resources, size_bytes)
        self.driver.fill(memory.address, 0, memory.size_bytes, self._stream)
        return memory

    def hold(self, data: NDArray[Any]) -> DeviceMemory:
        """A copy of ``data`` on the GPU."""
        memory = self.allocate(data.nbytes)
        self.write(memory.address, data)
        return memory

    def mirror(self, array: NDArray[Any]) -> StagedMirror:
        """Give a host array its copy on the GPU."""
        return self.staging.mirror(array)

    def tensor(self, view: View) -> Any:
        """A ``tvm_ffi.Tensor`` over memory of the GPU."""
        return tensor_at(*view, (CUDA_DEVICE, self.ordinal))

    def write(self, address: int, source: NDArray[Any]) -> None:
        """Copy a host array to the GPU, in order with the calls before and after."""
        self.enter()
        data, bounce = as_bytes(source), self._bounce
        for start in range(0, data.size, BOUNCE_BYTES):
            piece = data[start : start + BOUNCE_BYTES]
            bounce.bytes[: piece.size] = piece
            self.driver.copy_in(address + start, bounce.address, piece.size, self._stream)
            self.driver.synchronize(self._stream)

    def read(self, view: View) -> NDArray[Any]:
        """A copy of what is in ``view``, once all calls before are finished."""
        self.enter()
        result: NDArray[Any] = np.empty(view.shape, view.dtype)
        data, bounce = as_bytes(result), self._bounce
        for start in range(0, data.size, BOUNCE_BYTES):
            piece = data[start : start + BOUNCE_BYTES]
            self.driver.copy_out(bounce.address, view.address + start, piece.size, self._stream)
            self.driver.synchronize(self._stream)
            piece[:] = bounce.bytes[: piece.size]
        self._finished()
        return result

    def copy_in(self, address: int, source: int, size_bytes: int) -> None:
        """Copy pinned memory to the GPU, in order with the calls before and after; returns at once."""
        self.enter()
        self.driver.copy_in(address, source, size_bytes, self._stream)

    def show_staged(self) -> None:
        """Put the copy of what the host has staged into the stream now, where it would wait for what comes next."""
        self.enter()
        self.staging.copy()

    def results(self, capacity_bytes: int) -> Results:
        """Room for results that the host takes while later calls run."""
        self.enter()
        return Results(self.resources, self._stream, capacity_bytes, self.enter, self.mark)

    def gather(self, source: int, target: int, rows: Sequence[int], row_bytes: int) -> None:
        """Copy rows to lie one after the other; neighbours go in one copy."""
        self.enter()
        place = 0
        while place < len(rows):
            count = 1
            while place + count < len(rows) and rows[place + count] == rows[place] + count:
                count += 1
            begin, end = target + place * row_bytes, source + rows[place] * row_bytes
            self.driver.copy_within(begin, end, count * row_bytes, self._stream)
            place += count

    def prepare(self, calls: Sequence[Call], stats: Stats, *, often: bool = False) -> Runnable:
        """Make calls ready to be launched again and again; what runs often is a graph from the second time on."""
        whole = calls if self.complete is None else self.complete(calls)
        run: Runnable = CallList(
            self.resources, self._stream, self.staging, whole, stats, self.enter, self.unfinished, often
        )
        for attendance in self.attendances:
            run = attendance.attend(calls, run)
        return run

    def synchronize(self) -> None:
        """Wait until all calls have finished.

        Raises:
            DeviceError: one of them failed.
        """
        self.enter()
        self.driver.synchronize(self._stream)
        self._finished()

    def _finished(self) -> None:
        self.mark()()

    def mark(self) -> Callable[[], None]:
        """See `moec.runtime.device.Device`."""
        marks = [(attendance, attendance.launched) for attendance in self.attendances]

        def finished() -> None:
            for attendance, launched in marks:
                attendance.finished(launched)

        return finished


def check_ordinal(driver: Driver, ordinal: int) -> None:
    """See that there is a GPU with this number.

    Raises:
        DeviceError: there is none.
    """
    count = driver.device_count()
    if ordinal >= count:
        names = ", ".join(f"cuda:{number} ({driver.device_name(number)})" for number in range(count))
        raise DeviceError(
            f"There is no GPU cuda:{ordinal}.",
            f"This process sees {names or 'none'}.",
            "Choose one of these, or check CUDA_VISIBLE_DEVICES.",
        )
