"""The way from one GPU's memory to another's: straight where the driver allows it, else through pinned host memory.

Either way the GPUs wait for each other by events, and the host for neither.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from moec.errors import DeviceError
from moec.runtime.device import padded_bytes
from moec.runtime.devices.cuda.driver.memory import PinnedMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.runtime.device import Link, Move
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.driver.functions import Handle
    from moec.runtime.devices.cuda.driver.resources import Resources


def reaches(source: CudaDevice, target: CudaDevice) -> bool:
    """Whether the second GPU can read the first one's memory."""
    return source.driver.can_reach(target.ordinal, source.ordinal)


def link_between(source: CudaDevice, target: CudaDevice, capacity_bytes: int) -> Link:
    """The way for at most so many bytes at once.

    Raises:
        BudgetError: there is no pinned memory for them, where it is needed.
    """
    if reaches(source, target):
        return PeerLink(source, target)
    return HostLink(source, target, capacity_bytes)


class _Ends:
    """Two GPUs and the marks by which they wait for each other."""

    def __init__(self, source: CudaDevice, target: CudaDevice) -> None:
        self.source, self.target, self.driver = source, target, source.driver
        source.enter()
        self.sent = source.resources.event()
        target.enter()
        self.taken = target.resources.event()
        for one, other in ((source, target), (target, source)):
            one.resources.at_close(partial(_settle, other.resources, other.stream))

    def sending(self) -> Handle:
        """Enter the source; its stream."""
        self.source.enter()
        return self.source.stream

    def receiving(self) -> Handle:
        """Let the target wait for the source's stream so far, but not what the host has staged; its stream."""
        self.driver.record(self.sent, self.source.stream)
        self.target.show_staged()
        self.driver.wait_in(self.target.stream, self.sent)
        return self.target.stream


class PeerLink:
    """See `moec.runtime.device.Link`: the target's copy engine reads the source's memory."""

    def __init__(self, source: CudaDevice, target: CudaDevice) -> None:
        self._ends, self._driver = _Ends(source, target), source.driver
        target.enter()
        self._driver.reach(source.resources.context)

    def carry(self, moves: Sequence[Move]) -> None:
        """See `moec.runtime.device.Link`."""
        ends = self._ends
        ends.sending()
        stream = ends.receiving()
        theirs, own = ends.target.resources.context, ends.source.resources.context
        for move in moves:
            self._driver.copy_across(move.target, theirs, move.source, own, move.size_bytes, stream)
        self._driver.record(ends.taken, stream)

    def settle(self) -> None:
        """See `moec.runtime.device.Link`."""
        self._driver.wait_in(self._ends.sending(), self._ends.taken)


class HostLink:
    """See `moec.runtime.device.Link`: through pinned memory of the host.

    Raises:
        BudgetError: there is not so much.
    """

    def __init__(self, source: CudaDevice, target: CudaDevice, capacity_bytes: int) -> None:
        self._ends, self._driver = _Ends(source, target), source.driver
        source.enter()
        self._memory = PinnedMemory(source.resources, padded_bytes(capacity_bytes))

    def carry(self, moves: Sequence[Move]) -> None:
        """See `moec.runtime.device.Link`."""
        ends, places, end = self._ends, [], self._memory.address
        for move in moves:
            places.append(end)
            end += padded_bytes(move.size_bytes)
        assert end <= self._memory.address + self._memory.bytes.size, "the way was planned too narrow"
        stream = ends.sending()
        self._driver.wait_in(stream, ends.taken)
        for move, place in zip(moves, places, strict=True):
            self._driver.copy_out(place, move.source, move.size_bytes, stream)
        stream = ends.receiving()
        for move, place in zip(moves, places, strict=True):
            self._driver.copy_in(move.target, place, move.size_bytes, stream)
        self._driver.record(ends.taken, stream)

    def settle(self) -> None:
        """Nothing: what is carried leaves the source's memory before its next calls."""


def _settle(resources: Resources, stream: Handle) -> None:
    """Nothing of one GPU goes while the other one may still read it."""
    if not resources.closed:
        with contextlib.suppress(DeviceError):
            resources.driver.synchronize(stream)
