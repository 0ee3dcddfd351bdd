"""A list of calls that runs again and again: as single launches, or after the first time as one captured graph."""

from __future__ import annotations

import contextlib
from time import perf_counter
from typing import TYPE_CHECKING

from moec.errors import DeviceError
from moec.runtime.device import CapturedCall, HostCall, PackedCall

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.runtime.device import Call
    from moec.runtime.devices.cuda.driver.functions import Handle
    from moec.runtime.devices.cuda.driver.resources import Resources
    from moec.runtime.devices.cuda.staging import Staging
    from moec.runtime.devices.cuda.unfinished import Unfinished
    from moec.runtime.stats import Stats


class CallList:
    """Runs ``calls``: one by one, or where they run often from the second time on as a graph.

    The first run loads each kernel's code into the GPU, which a capture forbids. Where the host has a part in it
    (`HostCall`), each run is one by one. The copy of what the host staged goes before the calls, and before that what a
    list left to be mended that was cut short.

    Args:
        resources: of the GPU.
        stream: where calls are launched; TVM's current stream of this thread too.
        staging: what is copied first.
        calls: see `moec.runtime.device.Device.prepare`.
        stats: gets the time that launching takes; of a graph all goes to the first call's stage.
        enter: makes the GPU the calling thread's.
        unfinished: of all lists of the GPU.
        often: whether a graph is worth it.
    """

    def __init__(
        self,
        resources: Resources,
        stream: Handle,
        staging: Staging,
        calls: Sequence[Call],
        stats: Stats,
        enter: Callable[[], None],
        unfinished: Unfinished,
        often: bool,
    ) -> None:
        self._resources = resources
        self._driver = resources.driver
        self._stream = stream
        self._staging = staging
        self._calls = tuple(calls)
        self._stats = stats
        self._enter, self._unfinished = enter, unfinished
        self._capturable = often and all(isinstance(call, PackedCall) for call in self._calls)
        self._warm = False
        self._graph: Handle | None = None

    @property
    def captured(self) -> bool:
        """Whether it runs as a graph by now."""
        return self._graph is not None

    def __call__(self) -> None:
        """Put the calls into the stream."""
        self._enter()
        self._unfinished.mend()
        self._staging.copy()
        if not (self._capturable and self._warm):
            with self._unfinished.launching():
                self._run_each()
            self._warm = True
            return
        started = perf_counter()
        if self._graph is None:
            self._graph = self._capture()
        self._driver.launch(self._graph, self._stream)
        self._stats.milliseconds[self._calls[0].stage] += (perf_counter() - started) * 1e3

    def _run_each(self) -> None:
        before = perf_counter()
        for call in self._calls:
            if isinstance(call, HostCall):
                call.run()
            else:
                own = call.before if isinstance(call, CapturedCall) else call
                own.function(*own.arguments)
            after = perf_counter()
            self._stats.milliseconds[call.stage] += (after - before) * 1e3
            before = after

    def _capture(self) -> Handle:
        driver, stream = self._driver, self._stream
        try:
            driver.begin_capture(stream)
            for call in self._calls:
                assert isinstance(call, PackedCall)
                call.function(*call.arguments)
        except BaseException:
            # The stream must not stay in capture; what was noted so far is worth nothing.
            with contextlib.suppress(DeviceError):
                driver.destroy_graph(driver.end_capture(stream))
            raise
        graph = driver.end_capture(stream)
        self._resources.keep_graph(graph)
        return graph

    def __del__(self) -> None:
        if self._graph is not None:
            self._resources.drop_graph(self._graph)
