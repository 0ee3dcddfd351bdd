"""A CUDA driver in Python: memory is the host's, everything happens at once, and failures can be ordered."""

from __future__ import annotations

import ctypes
import itertools
import threading
from typing import Any

import numpy as np

from moec.errors import DeviceError
from moec.runtime.devices.cuda.driver.functions import Handle, OutOfDeviceMemoryError


class FakeDriver:
    """See `moec.runtime.devices.cuda.driver.functions.Driver`; ``log`` has the names of what was called."""

    def __init__(self, memory_bytes: int = 1 << 24, gpus: int = 1) -> None:
        self.memory_bytes, self.gpus = memory_bytes, gpus
        self.blocks: dict[int, Any] = {}
        self.alive: dict[str, set[Any]] = {name: set() for name in ("context", "stream", "event", "pinned")}
        self._host: dict[int, Any] = {}
        self.broken = False
        self.log: list[str] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._threads = threading.local()

    def device_count(self) -> int:
        return self.gpus

    def device_name(self, ordinal: int) -> str:
        return f"Fake GPU {ordinal}"

    def capability(self, ordinal: int) -> tuple[int, int]:
        return 9, 0

    def attribute(self, ordinal: int, number: int) -> int:
        return {13: 1_980_000, 16: 132, 18: 0}[number]

    def version(self) -> tuple[int, int]:
        return 13, 0

    def retain_context(self, ordinal: int) -> Handle:
        return self._make("context")

    def release_context(self, ordinal: int) -> None:
        self.alive["context"].pop()

    def use_context(self, context: Handle) -> None:
        self._threads.context = context

    def swap_context(self, context: Handle) -> Handle | None:
        before = getattr(self._threads, "context", None)
        self.use_context(context)
        return None if before in {None, context} else before

    def can_reach(self, ordinal: int, other: int) -> bool:
        return False

    def reach(self, other: Handle) -> None:
        raise AssertionError("no GPU of the fake reaches another")

    def memory_info(self) -> tuple[int, int]:
        return self.memory_bytes - sum(map(len, self.blocks.values())), self.memory_bytes

    def allocate(self, size_bytes: int) -> int:
        self._call("allocate")
        if size_bytes > self.memory_info()[0]:
            raise OutOfDeviceMemoryError
        return self._block(size_bytes)

    def free(self, address: int) -> None:
        self._call("free")
        del self.blocks[address]

    def allocate_pinned(self, size_bytes: int) -> int:
        self._call("allocate_pinned")
        with self._lock:
            block = np.empty(size_bytes, np.uint8)
            address = int(block.ctypes.data)
            self._host[address] = block
            self.alive["pinned"].add(address)
        return address

    def free_pinned(self, address: int) -> None:
        self._call("free_pinned")
        with self._lock:
            self.alive["pinned"].remove(address)
            del self._host[address]

    def register(self, address: int, size_bytes: int) -> None:
        self._call("register")
        self.alive["pinned"].add(address)

    def unregister(self, address: int) -> None:
        self._call("unregister")
        self.alive["pinned"].remove(address)

    def create_stream(self, urgent: bool = False) -> Handle:
        return self._make("stream")

    def destroy_stream(self, stream: Handle) -> None:
        self.alive["stream"].remove(stream)

    def synchronize(self, stream: Handle) -> None:
        self._call("synchronize")

    def create_event(self, timed: bool = False) -> Handle:
        return self._make("event")

    def destroy_event(self, event: Handle) -> None:
        self.alive["event"].remove(event)

    def record(self, event: Handle, stream: Handle) -> None:
        self._call("record")

    def wait(self, event: Handle) -> None:
        self._call("wait")

    def happened(self, event: Handle) -> bool:
        self._call("happened")
        return True

    def wait_in(self, stream: Handle, event: Handle) -> None:
        self._call("wait_in")

    def milliseconds(self, start: Handle, end: Handle) -> float:
        return 2.0

    def copy_in(self, address: int, source: int, size_bytes: int, stream: Handle) -> None:
        self._call("copy_in")
        ctypes.memmove(address, source, size_bytes)

    def copy_out(self, target: int, address: int, size_bytes: int, stream: Handle) -> None:
        self._call("copy_out")
        ctypes.memmove(target, address, size_bytes)

    def copy_within(self, target: int, source: int, size_bytes: int, stream: Handle) -> None:
        self._call("copy_within")
        ctypes.memmove(target, source, size_bytes)

    def copy_across(
        self,
        target: int,
        target_context: Handle,
        source: int,
        source_context: Handle,
        size_bytes: int,
        stream: Handle,
    ) -> None:
        self.copy_within(target, source, size_bytes, stream)

    def fill(self, address: int, value: int, size_bytes: int, stream: Handle) -> None:
        self._call("fill")
        ctypes.memset(address, value, size_bytes)

    def entry(self, name: str) -> int:
        return 0

    def number(self, stream: Handle) -> int:
        return id(stream)

    def begin_capture(self, stream: Handle) -> None:
        self._call("begin_capture")

    def end_capture(self, stream: Handle) -> Handle:
        self._call("end_capture")
        return Handle(object())

    def launch(self, graph: Handle, stream: Handle) -> None:
        self._call("launch")

    def destroy_graph(self, graph: Handle) -> None:
        self._call("destroy_graph")

    def contents(self, address: int) -> bytes:
        """What is in a block of device memory."""
        return bytes(self.blocks[address])

    def _block(self, size_bytes: int) -> int:
        block = np.zeros(size_bytes, np.uint8)
        self.blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def _make(self, kind: str) -> Handle:
        handle = f"{kind} {next(self._numbers)}"
        self.alive[kind].add(handle)
        return Handle(handle)

    def _call(self, name: str) -> None:
        self.log.append(name)
        if self.broken:
            raise DeviceError("The GPU failed.", "An illegal address.", "")
        assert getattr(self._threads, "context", None) is not None, f"{name} in a thread without a context"
