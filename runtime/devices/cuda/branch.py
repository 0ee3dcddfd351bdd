"""A second stream whose calls run beside those of a device's own: in a captured step a branch of the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.runtime.device import PackedCall

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.runtime.device import Call
    from moec.runtime.devices.cuda.device import CudaDevice

STAGE = "experts"


class BranchCall(PackedCall):
    """A call of a branch, or one that orders it and the device's own stream."""

    __slots__ = ()


class Branch:
    """Makes the calls.

    Every list of calls that has some ends when the branch has caught up (`closed`), so that what was captured is whole
    and no mark is waited for outside of the list that set it.

    Args:
        device: the GPU; it is told, so that it closes lists.
        marks: how many marks there are.
    """

    def __init__(self, device: CudaDevice, marks: int) -> None:
        self._device, self._driver = device, device.driver
        self._stream = device.resources.stream()
        self._fork, self._end = device.resources.event(), device.resources.event()
        self._marks = [device.resources.event() for _ in range(marks)]
        device.complete = self.closed

    def fork(self) -> Call:
        """What comes next in the branch waits for what came before in the device's stream."""
        return BranchCall(STAGE, self._wait_for_device, ())

    def call(self, function: Callable[..., Any], *arguments: Any) -> Call:
        """A packed function in the branch."""
        return BranchCall(STAGE, self._launch, (function, *arguments))

    def mark(self, number: int) -> Call:
        """Set a mark at the branch's present end."""
        return BranchCall(STAGE, self._driver.record, (self._marks[number], self._stream))

    def join(self, number: int) -> Call:
        """What comes next in the device's stream waits for a mark."""
        return BranchCall(STAGE, self._wait_for_mark, (number,))

    def closed(self, calls: Sequence[Call]) -> Sequence[Call]:
        """``calls``, and where the branch has any of them its end."""
        if not any(isinstance(call, BranchCall) for call in calls):
            return calls
        return [*calls, BranchCall(STAGE, self._catch_up, ())]

    def synchronize(self) -> None:
        """Wait until the branch is idle.

        Raises:
            DeviceError: a call failed.
        """
        self._device.enter()
        self._driver.synchronize(self._stream)

    def _wait_for_device(self) -> None:
        self._driver.record(self._fork, self._device.stream)
        self._driver.wait_in(self._stream, self._fork)

    def _wait_for_mark(self, number: int) -> None:
        self._driver.wait_in(self._device.stream, self._marks[number])

    def _catch_up(self) -> None:
        self._driver.record(self._end, self._stream)
        self._driver.wait_in(self._device.stream, self._end)

    def _launch(self, function: Callable[..., Any], *arguments: Any) -> None:
        with self._device.launching_in(self._stream):
            function(*arguments)
