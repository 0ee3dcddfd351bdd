"""Time of torch's work, and of packed functions on torch's tensors: with events on a GPU, by the clock on a CPU."""

from __future__ import annotations

import time
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

WARM_UPS = 3
REPEATS = 20
LEAST_SECONDS = 2e-3
"""On a GPU, what is timed between two events is repeated until it takes so long."""


@contextmanager
def tvm_in_torch_stream(device: torch.device) -> Iterator[None]:
    """Have packed functions launch in the stream that is torch's current one, so that they are captured with it."""
    if device.type != "cuda":
        yield
        return
    import tvm_ffi

    stream = torch.cuda.current_stream(device).cuda_stream
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", device.index or 0), stream):
        yield


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own for torch and packed functions: launches that overlap are for such streams."""
    if device.type != "cuda":
        yield
        return
    outer = torch.cuda.current_stream(device)
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(outer)
    with torch.cuda.stream(stream), tvm_in_torch_stream(device):
        yield
    outer.wait_stream(stream)
    torch.cuda.synchronize(device)


def seconds(
    calls: Sequence[Callable[[], Any]], device: torch.device, *, repeats: int = REPEATS, graph: bool = True
) -> float:
    """Median seconds of one of ``calls``, which run one after the other, each on inputs of its own.

    On a GPU they are captured as one graph, so that gaps between launches are a graph's; ``graph=False`` launches
    them one by one.
    """
    if device.type != "cuda":
        return _host_seconds(calls, repeats)
    with side_stream(device):
        for _ in range(WARM_UPS):
            for call in calls:
                call()
    run = _captured(calls, device) if graph else _each(calls)
    rounds = max(1, round(LEAST_SECONDS / max(_event_seconds(run, 1), 1e-7)))
    return median(_event_seconds(run, rounds) for _ in range(repeats)) / len(calls)


def _each(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _captured(calls: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), tvm_in_torch_stream(device):
        for call in calls:
            call()
    replay: Callable[[], None] = graph.replay
    replay()
    return replay


def _event_seconds(run: Callable[[], None], rounds: int) -> float:
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    begin, end = events
    begin.record()
    for _ in range(rounds):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / rounds


def _host_seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    _each(calls)()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        _each(calls)()
        times.append(time.perf_counter() - start)
    return median(times) / len(calls)
