"""Everything taken from the driver for one model, so that all of it is given back: on close, on errors, at exit."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from moec.artifacts.sizes import exact_bytes, human_bytes
from moec.errors import BudgetError, DeviceError
from moec.runtime.device import closed_error
from moec.runtime.devices.cuda.driver.functions import OutOfDeviceMemoryError
from moec.runtime.machine.interrupts import uninterrupted
from moec.runtime.process import OwnProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moec.runtime.devices.cuda.driver.functions import Driver, Handle

current = threading.local()
"""``device``: whom this thread's driver and TVM's launches are set to, see `moec.runtime.devices.cuda.device`."""

LOWER = "Raise device_memory, or lower cache_tokens, max_step_tokens or max_batch."


class Resources:
    """Memory, streams, events and graphs of one GPU; device memory within a hard limit.

    Args:
        driver: the CUDA driver.
        ordinal: the GPU's number.
    """

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self.driver = driver
        self.limit_bytes = 0
        """Device memory is never allocated beyond it."""
        self.used_bytes = 0
        """Device memory allocated now."""
        self.reserved_bytes = 0
        """What of the limit the driver itself takes: code, graphs."""
        self.pinned_bytes = 0
        """Pinned host memory allocated now."""
        self._ordinal = ordinal
        self._process = OwnProcess()
        # One that was asked for memory may come upon garbage that has some.
        self._lock = threading.RLock()
        self._device: dict[int, int] = {}
        self._pinned: dict[int, int] = {}
        self._registered: dict[int, int] = {}
        self._graphs: dict[int, Handle] = {}
        self._others: list[tuple[Callable[[Handle], None], Handle]] = []
        self._actions: list[Callable[[], None]] = []
        self._context: Handle | None = driver.retain_context(ordinal)
        self.enter()

    @property
    def closed(self) -> bool:
        """Whether all was given back."""
        return self._context is None

    def enter(self) -> None:
        """Make the GPU the calling thread's.

        Raises:
            DeviceError: everything was given back.
        """
        if self._context is None:
            raise closed_error()
        current.device = None
        self.driver.use_context(self._context)

    @property
    def context(self) -> Handle:
        """The GPU's.

        Raises:
            DeviceError: everything was given back.
        """
        if self._context is None:
            raise closed_error()
        return self._context

    def reserve(self, size_bytes: int) -> None:
        """Count memory that the driver takes by itself.

        Raises:
            BudgetError: it does not fit.
        """
        self._check(size_bytes)
        self.reserved_bytes += size_bytes

    def allocate(self, size_bytes: int) -> int:
        """Address of device memory.

        Raises:
            BudgetError: it is more than the limit leaves, or than the GPU has.
        """
        with uninterrupted(), self._lock:
            self._check(size_bytes)
            try:
                address = self.driver.allocate(size_bytes)
            except OutOfDeviceMemoryError as error:
                free, _ = self.driver.memory_info()
                raise BudgetError(
                    f"The GPU has no memory left: {max(0, size_bytes - free)} bytes are missing.",
                    f"{size_bytes} bytes were asked for, {free} are free; others may use the same GPU.",
                    "End other programs on the GPU, or lower cache_tokens, max_step_tokens or max_batch.",
                ) from error
            self._device[address] = size_bytes
            self.used_bytes += size_bytes
        return address

    def free(self, address: int) -> None:
        """Give device memory back; nothing happens where that is done already."""
        with self._lock:
            size = self._device.pop(address, None)
            if size is not None:
                self.used_bytes -= size
                self._quietly(self.driver.free, address)

    def pin(self, size_bytes: int) -> int:
        """Address of pinned host memory.

        Raises:
            BudgetError: the host has not so much.
        """
        with uninterrupted(), self._lock:
            try:
                address = self.driver.allocate_pinned(size_bytes)
            except OutOfDeviceMemoryError as error:
                raise BudgetError(
                    f"{size_bytes} bytes of pinned host memory cannot be had.",
                    "The system allows this process no more (ulimit -l), or has no memory left.",
                    "Raise the limit, or free host memory.",
                ) from error
            self._pinned[address] = size_bytes
            self.pinned_bytes += size_bytes
        return address

    def unpin(self, address: int) -> None:
        """Give pinned memory back; nothing happens where that is done already."""
        with self._lock:
            size = self._pinned.pop(address, None)
            if size is not None:
                self.pinned_bytes -= size
                self._quietly(self.driver.free_pinned, address)

    def register(self, address: int, size_bytes: int) -> None:
        """Pin memory that the host has already.

        Raises:
            BudgetError: the system does not pin so much.
        """
        with uninterrupted():
            try:
                self.driver.register(address, size_bytes)
            except OutOfDeviceMemoryError as error:
                raise BudgetError(
                    f"{size_bytes} bytes of host memory cannot be pinned.",
                    "The system allows this process no more (ulimit -l), or has no memory left.",
                    "Raise the limit, free host memory, or lower host_memory.",
                ) from error
            with self._lock:
                self._registered[address] = size_bytes
                self.pinned_bytes += size_bytes

    def unregister(self, address: int) -> None:
        """Undo `register`; nothing happens where that is done already."""
        with self._lock:
            size = self._registered.pop(address, None)
            if size is not None:
                self.pinned_bytes -= size
                self._quietly(self.driver.unregister, address)

    def stream(self, urgent: bool = False) -> Handle:
        """A new stream, kept to the end."""
        with uninterrupted():
            stream = self.driver.create_stream(urgent)
            self._others.append((self.driver.destroy_stream, stream))
        return stream

    def event(self, timed: bool = False) -> Handle:
        """A new event, kept to the end."""
        with uninterrupted():
            event = self.driver.create_event(timed)
            self._others.append((self.driver.destroy_event, event))
        return event

    def at_close(self, action: Callable[[], None]) -> None:
        """Do something when everything is given back, before any of it goes."""
        self._actions.append(action)

    def keep_graph(self, graph: Handle) -> None:
        """Let go of a graph at the end, where `drop_graph` has not."""
        with self._lock:
            self._graphs[id(graph)] = graph

    def drop_graph(self, graph: Handle) -> None:
        """Let go of a graph; nothing happens where that is done already."""
        with self._lock:
            if self._graphs.pop(id(graph), None) is not None:
                self._quietly(self.driver.destroy_graph, graph)

    def close(self) -> None:
        """Give everything back, the newest first; errors of a broken GPU do not stop that.

        A process that is forked from the one that took it leaves it to that one.
        """
        if self._context is not None and self._process.here:
            with uninterrupted(), self._inside():
                self._close()

    def _close(self) -> None:
        while self._actions:
            self._actions.pop()()
        for graph in list(self._graphs.values()):
            self.drop_graph(graph)
        for destroy, handle in reversed(self._others):
            if destroy == self.driver.destroy_stream:
                with contextlib.suppress(DeviceError):
                    self.driver.synchronize(handle)
            with contextlib.suppress(DeviceError):
                destroy(handle)
        self._others.clear()
        for address in list(self._pinned):
            self.unpin(address)
        for address in list(self._registered):
            self.unregister(address)
        for address in list(self._device):
            self.free(address)
        self._context = None
        with contextlib.suppress(DeviceError):
            self.driver.release_context(self._ordinal)

    def _check(self, size_bytes: int) -> None:
        taken = self.used_bytes + self.reserved_bytes
        if taken + size_bytes > self.limit_bytes:
            raise BudgetError(
                f"device_memory is {exact_bytes(taken + size_bytes - self.limit_bytes)} too small.",
                f"{human_bytes(taken)} of {human_bytes(self.limit_bytes)} are in use, and "
                f"{human_bytes(size_bytes)} more are needed.",
                LOWER,
            )

    def _quietly(self, release: Callable[[Any], None], handle: Any) -> None:
        """A release in whichever thread the last reference went; a broken GPU has nothing to give back."""
        if self._process.here:
            with self._inside(), contextlib.suppress(DeviceError):
                release(handle)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """The GPU is the calling thread's meanwhile, which may be at work with another one."""
        before: Handle | None = None
        with contextlib.suppress(DeviceError):
            if self._context is not None:
                before = self.driver.swap_context(self._context)
        yield
        with contextlib.suppress(DeviceError):
            if before is not None:
                self.driver.use_context(before)
