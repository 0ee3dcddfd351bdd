"""A GPU's order book in plain memory, and a driver whose copies are the host's own, for tests of the CPU's side."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from moec.artifacts.words import orders
from moec.runtime.sharing.feeder import CopyDriver, Feeder
from moec.runtime.sharing.order_book import BOOK_BYTES, OrderBook
from moec.runtime.tensors import aligned_zeros
from tests.support.waiting import HANG_NS

STREAM = 0x57AE

COPY_IN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
WRITE_VALUE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
"""Their types."""


class HostDriver:
    """Two of the driver's functions: each copy is done when it is asked for; ``sizes`` has what was copied.

    Args:
        refuses: the number of the copy that fails, with status 700; -1: none.
    """

    def __init__(self, refuses: int = -1) -> None:
        self.sizes: list[int] = []
        self.threads: set[int] = set()
        self._refuses = refuses
        self._functions = COPY_IN(self._copy), WRITE_VALUE(self._write)

    def _copy(self, target: int, source: int, size: int, stream: int) -> int:
        assert stream == STREAM
        if len(self.sizes) == self._refuses:
            return 700
        self.sizes.append(size)
        self.threads.add(threading.get_ident())
        ctypes.memmove(target, source, size)
        return 0

    def _write(self, stream: int, place: int, value: int, flags: int) -> int:
        assert (stream, flags) == (STREAM, 0)
        ctypes.c_uint32.from_address(place).value = value
        return 0

    def entries(self, counter: int) -> CopyDriver:
        """As a feeder takes them."""
        copy, write = (ctypes.cast(each, ctypes.c_void_p).value or 0 for each in self._functions)
        return CopyDriver(copy, write, STREAM, counter)


class Orders:
    """The memory of both sides, and a thread that fills orders."""

    def __init__(self, feed: Callable[..., Any], driver: HostDriver | None = None) -> None:
        self._memory = aligned_zeros((BOOK_BYTES // 8,), np.int64)
        self.notes = aligned_zeros((orders.NOTES_WORDS,), np.int64)
        self.book = OrderBook(self._memory.ctypes.data, HANG_NS)
        self.words = self.book.words
        self.copies = self._memory[orders.BOOK_WORDS :].reshape(orders.MOST_COPIES, orders.COPY_WORDS)
        self.driver = driver or HostDriver()
        counter = self.notes.ctypes.data + 8 * orders.COPIED
        self.feeder = Feeder(feed, self.book, self.driver.entries(counter), lambda: None)
