"""Lists of calls in which the CPU has a part: what a device asks of whoever computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.runtime.device import Call
    from moec.runtime.devices.cuda.graphs import CallList


class Share(Protocol):
    """The CPU's part in steps, see `moec.runtime.devices.cuda.sharing.CpuShare`."""

    launched: int
    """Lists of calls that may make requests and were put into the stream."""

    def attend(self, calls: Sequence[Call], run: CallList) -> CallList | Attended:
        """What runs a list of calls, with the CPU's threads awake where they make requests."""
        ...

    def run(self, calls: CallList) -> None:
        """Run a list with the CPU's threads awake."""
        ...

    def finished(self, launched: int) -> None:
        """The first ``launched`` lists are over.

        Raises:
            DeviceError: a request was not answered.
        """
        ...


class Attended:
    """A list of calls that may make requests."""

    def __init__(self, share: Share, calls: CallList) -> None:
        self._share, self._calls = share, calls

    @property
    def captured(self) -> bool:
        """Whether it runs as a graph by now."""
        return self._calls.captured

    def __call__(self) -> None:
        """Put the calls into the stream."""
        self._share.run(self._calls)
