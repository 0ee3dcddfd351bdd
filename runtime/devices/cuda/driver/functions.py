"""The CUDA driver as a few typed functions; everything above this file works with a fake of it as well.

Handles (contexts, streams, events, graphs) are whatever the driver returned; addresses are integers.
"""

from __future__ import annotations

from typing import NewType, Protocol

from moec.errors import BudgetError

Handle = NewType("Handle", object)


class OutOfDeviceMemoryError(BudgetError):
    """The driver has no memory left; `moec.runtime.devices.cuda.driver.resources` says of what it takes how much.

    Args:
        name: of the driver's function that says so.
    """

    def __init__(self, name: str = "The driver") -> None:
        super().__init__(
            "The GPU has no memory left for the driver itself.",
            f"{name} found none for a context, code or a graph; others may use the same GPU.",
            "End other programs on the GPU, or lower device_memory.",
        )


class Driver(Protocol):
    """What the runtime asks of the CUDA driver. Copies and launches return at once; `synchronize` waits."""

    def version(self) -> tuple[int, int]:
        """The newest CUDA version that the driver supports."""
        ...

    def device_count(self) -> int:
        """GPUs that this process may use."""
        ...

    def device_name(self, ordinal: int) -> str:
        """The GPU's name as its maker gives it."""
        ...

    def capability(self, ordinal: int) -> tuple[int, int]:
        """Compute capability, such as ``(9, 0)``."""
        ...

    def attribute(self, ordinal: int, number: int) -> int:
        """One of the driver's attributes of a GPU, by its number (``CUdevice_attribute``)."""
        ...

    def retain_context(self, ordinal: int) -> Handle:
        """The GPU's primary context, shared with whoever else in the process uses the GPU."""
        ...

    def release_context(self, ordinal: int) -> None:
        """Undo `retain_context`."""
        ...

    def use_context(self, context: Handle) -> None:
        """Make ``context`` the calling thread's."""
        ...

    def swap_context(self, context: Handle) -> Handle | None:
        """`use_context`; the context that the thread had before, ``None`` where it was the same one, or none."""
        ...

    def can_reach(self, ordinal: int, other: int) -> bool:
        """Whether one GPU can read and write another's memory without a detour through the host's."""
        ...

    def reach(self, other: Handle) -> None:
        """Let the current context's GPU do so with the memory of the context ``other``; it may be done already."""
        ...

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the current context's GPU."""
        ...

    def allocate(self, size_bytes: int) -> int:
        """Address of memory on the GPU, 256-byte aligned.

        Raises:
            OutOfDeviceMemoryError: there is not so much.
        """
        ...

    def free(self, address: int) -> None:
        """Give memory of `allocate` back, once nothing uses it."""
        ...

    def allocate_pinned(self, size_bytes: int) -> int:
        """Address of host memory that never moves, so that copies from and to it need no detour.

        Raises:
            OutOfDeviceMemoryError: there is not so much.
        """
        ...

    def free_pinned(self, address: int) -> None:
        """Give memory of `allocate_pinned` back."""
        ...

    def register(self, address: int, size_bytes: int) -> None:
        """Pin host memory that is there already; kernels then read it at the same address.

        Raises:
            OutOfDeviceMemoryError: so much cannot be pinned.
        """
        ...

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        ...

    def create_stream(self, urgent: bool = False) -> Handle:
        """A queue of work that does not wait for others; an urgent one is for work that others wait for."""
        ...

    def destroy_stream(self, stream: Handle) -> None:
        """Let go of a stream."""
        ...

    def synchronize(self, stream: Handle) -> None:
        """Wait until all that is in the stream has finished.

        Raises:
            DeviceError: a part of it failed.
        """
        ...

    def create_event(self, timed: bool = False) -> Handle:
        """A mark that can be put into a stream."""
        ...

    def destroy_event(self, event: Handle) -> None:
        """Let go of an event."""
        ...

    def record(self, event: Handle, stream: Handle) -> None:
        """Put the mark at the stream's present end."""
        ...

    def wait(self, event: Handle) -> None:
        """Wait on the host until what came before the mark has finished; at once where it was never recorded."""
        ...

    def happened(self, event: Handle) -> bool:
        """Whether what came before the mark has finished; true where it was never recorded."""
        ...

    def wait_in(self, stream: Handle, event: Handle) -> None:
        """Let what comes next in ``stream`` wait for a mark in another one; not where it was never recorded."""
        ...

    def milliseconds(self, start: Handle, end: Handle) -> float:
        """Time between two timed events that have happened."""
        ...

    def copy_in(self, address: int, source: int, size_bytes: int, stream: Handle) -> None:
        """From host memory to the GPU's."""
        ...

    def copy_out(self, target: int, address: int, size_bytes: int, stream: Handle) -> None:
        """From the GPU's memory to the host's."""
        ...

    def copy_within(self, target: int, source: int, size_bytes: int, stream: Handle) -> None:
        """Within the GPU's memory."""
        ...

    def copy_across(
        self,
        target: int,
        target_context: Handle,
        source: int,
        source_context: Handle,
        size_bytes: int,
        stream: Handle,
    ) -> None:
        """From one GPU's memory to another's, in a stream of the current context; see `reach`."""
        ...

    def fill(self, address: int, value: int, size_bytes: int, stream: Handle) -> None:
        """Set bytes of the GPU's memory."""
        ...

    def entry(self, name: str) -> int:
        """The address of one of the driver's own functions, such as ``cuMemcpyHtoDAsync``; 0 where it has none."""
        ...

    def number(self, stream: Handle) -> int:
        """A stream as the driver's functions take it."""
        ...

    def begin_capture(self, stream: Handle) -> None:
        """From now on, note what is put into the stream instead of doing it."""
        ...

    def end_capture(self, stream: Handle) -> Handle:
        """Stop noting; what was noted, ready to be launched."""
        ...

    def launch(self, graph: Handle, stream: Handle) -> None:
        """Put all that a graph holds into the stream."""
        ...

    def destroy_graph(self, graph: Handle) -> None:
        """Let go of a graph that is not running."""
        ...
