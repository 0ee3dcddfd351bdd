"""Lists of calls in which threads of the CPU have a part: they are awake while such a list runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from moec.runtime.device import PackedCall

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.runtime.device import Call, Functions
    from moec.runtime.devices.cuda.graphs import CallList
    from moec.runtime.sharing.watchers import Watchers


class Attendance:
    """Wakes threads for the lists of calls that want something of them, and lets them sleep behind the last one.

    Args:
        threads: who watches.
        functions: of the GPU's module, among them those that want something.
        keep: what owns the memory that they watch.
    """

    def __init__(self, threads: Watchers, functions: Functions, keep: object) -> None:
        self.threads = threads
        self._keep: object = keep
        self._functions = functions
        self._found: dict[str, Callable[..., Any]] = {}
        self._inside = False
        self.launched = 0
        """Lists of calls that may want something and were put into the stream."""

    def function(self, name: str) -> Callable[..., Any]:
        """A function of the GPU's module that wants something of the threads."""
        if name not in self._found:
            self._found[name] = self._functions.get(name)
        return self._found[name]

    def leave(self) -> None:
        """The threads have left: nobody needs what they watched."""
        self._keep = None

    def attend(self, calls: Sequence[Call], run: Runnable) -> Runnable:
        """What runs a list of calls, with the threads awake where it wants something of them."""
        ours = {id(function) for function in self._found.values()}
        asks = any(isinstance(call, PackedCall) and id(call.function) in ours for call in calls)
        return Attended(self, run) if asks else run

    def run(self, calls: Runnable) -> None:
        """Run a list with the threads awake."""
        self.threads.begin()
        self.launched += 1
        self._inside = True
        try:
            calls()
        finally:
            self._inside = False

    def finished(self, launched: int) -> None:
        """The first ``launched`` lists are over: with the last of them threads may sleep, unless it has just begun.

        Raises:
            DeviceError: something was not done.
        """
        if launched == self.launched and not self._inside:
            self.threads.end()
        self.threads.check()


class Attended:
    """A list of calls that may want something."""

    def __init__(self, attendance: Attendance, calls: Runnable) -> None:
        self._attendance, self._calls = attendance, calls

    @property
    def captured(self) -> bool:
        """Whether it runs as a graph by now."""
        return self._calls.captured

    def __call__(self) -> None:
        """Put the calls into the stream."""
        self._attendance.run(self._calls)


Runnable: TypeAlias = "CallList | Attended"
