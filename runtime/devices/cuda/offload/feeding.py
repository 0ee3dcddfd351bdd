"""Missing experts over the copy engine: what the GPU orders in the middle of a captured step, a CPU thread copies."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.words import orders
from moec.errors import DeviceError
from moec.runtime.device import CapturedCall, View, padded_bytes
from moec.runtime.devices.cuda.attended import Attendance
from moec.runtime.devices.cuda.driver.memory import PinnedMemory
from moec.runtime.sharing.feeder import ADVICE, CopyDriver, Feeder
from moec.runtime.sharing.order_book import BOOK_BYTES, OrderBook

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.runtime.device import Functions, PackedCall
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.offload.states import LayerStates
    from moec.runtime.stats import Stats

STAGE = "experts"
PATIENCE_NS = 5 * 10**6
"""That the GPU waits for the host's thread at most, beside the time of a copy; another may have the thread's core."""
SLOWEST_BYTES_NS = 1
"""Of a link, GB/s: a copy that takes longer is one that nobody makes."""
SETTLE_SECONDS = 10.0
DEVICE_BYTES = padded_bytes(8 * orders.NOTES_WORDS)
"""Of the GPU's memory that it takes."""
HOST_BYTES = BOOK_BYTES
"""Of pinned host memory."""


class CopyFeeder:
    """Has missing experts brought by the copy engine, in place of the kernel that reads host memory.

    Args:
        device: the GPU; it is told, so that it wakes the thread before each step that may want it.
        states: of all layers.
        functions: of the GPU's module; it has ``order_experts``.
        feed: the CPU module's ``feed_copies``.
        most_bytes: of an expert.

    Raises:
        BudgetError: there is no memory for it.
        DeviceError: streams cannot write values here, or the thread did not start.
    """

    def __init__(
        self,
        device: CudaDevice,
        states: LayerStates,
        functions: Functions,
        feed: Callable[..., Any],
        most_bytes: int,
    ) -> None:
        driver = device.driver
        copy_in, write_value = driver.entry("cuMemcpyHtoDAsync"), driver.entry("cuStreamWriteValue32")
        if not (copy_in and write_value):
            raise DeviceError("The driver has no cuStreamWriteValue32.", "It is too old.", ADVICE)
        self._device = device
        self._stream = device.resources.stream(urgent=True)
        self._memory = PinnedMemory(device.resources, BOOK_BYTES)
        self._notes = device.allocate(8 * orders.NOTES_WORDS)
        device.synchronize()
        self._book = OrderBook(self._memory.address, PATIENCE_NS + most_bytes // SLOWEST_BYTES_NS)
        counter = self._notes.address + 8 * orders.COPIED
        copies = CopyDriver(copy_in, write_value, driver.number(self._stream), counter)
        self.feeder = Feeder(feed, self._book, copies, device.resources.enter)
        device.resources.at_close(self.feeder.close)
        self._try()
        self._attendance = Attendance(self.feeder, functions, self)
        self._order = self._attendance.function(orders.ORDER)
        device.attendances.append(self._attendance)
        device.unfinished.repair_with(self.settle, first=True)
        states.set_notes(self._notes.address)
        self._seen = (0, 0)
        self._settled = 0
        # Nothing is missing yet: this loads its code, which a capture forbids.
        self._order(*self._arguments(states.state(0)))
        device.synchronize()

    def fetch(self, state: View, before: PackedCall) -> CapturedCall:
        """Bring a layer's missing experts.

        The host's thread is not asked while kernels are launched one by one: the first launch of each loads its code,
        and the driver then makes no copy before the GPU is idle.

        Args:
            state: the layer's, int64 ``[W]``.
            before: what brings them then.
        """
        return CapturedCall(STAGE, self._order, self._arguments(state), before)

    def count(self, stats: Stats) -> None:
        """Add what the GPU has counted since the last time."""
        notes = self._device.read(self._view)
        counted = int(notes[orders.FED_BYTES]), int(notes[orders.LATE])
        stats.engine_bytes += counted[0] - self._seen[0]
        stats.late_orders += counted[1] - self._seen[1]
        self._seen = counted

    def settle(self) -> None:
        """Until no copy is under way that the GPU does not wait for, once all calls before are finished.

        For whoever is about to write where copies go to, or come from.

        Raises:
            DeviceError: the thread hangs.
        """
        self._device.synchronize()
        late = self._book.cancelled_order
        if late == self._settled:
            return
        self._await(int(self._device.read(self._view)[orders.ORDERED]))
        self._device.driver.synchronize(self._stream)
        self._settled = late

    def _try(self) -> None:
        """Make an order of nothing, in the GPU's place: not every system lets a stream write values.

        Raises:
            DeviceError: this one does not; the thread has left.
        """
        self._book.words[orders.COUNT], self._book.words[orders.POSTED] = 1, 1
        self.feeder.begin()
        try:
            self._await(1)
            self.feeder.check()
            self._device.driver.synchronize(self._stream)
        except DeviceError:
            self.feeder.close()
            raise
        self.feeder.end()
        notes = np.zeros(orders.NOTES_WORDS, np.int64)
        notes[[orders.SENT, orders.ORDERED, orders.COPIED]] = 1
        self._device.write(self._notes.address, notes)

    def _await(self, made: int) -> None:
        """Until so many copies are in the stream."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self.feeder.made < made:
            self.feeder.check()
            if time.monotonic() > deadline:
                raise DeviceError("The thread that copies experts hangs.", "The machine is too busy.", ADVICE)
            time.sleep(1e-4)

    def _arguments(self, state: View) -> tuple[Any, ...]:
        return tuple(map(self._device.tensor, (state, self._view, self._book.book, self._book.copies)))

    @property
    def _view(self) -> View:
        return View(self._notes.address, "int64", (orders.NOTES_WORDS,))
