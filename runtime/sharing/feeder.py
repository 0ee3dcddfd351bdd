"""The thread of the CPU that puts a GPU's copies into a stream, in one native call from start to stop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.words import orders
from moec.errors import DeviceError
from moec.runtime.sharing.watchers import Watchers, WatchState
from moec.runtime.tensors import aligned_zeros, tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.runtime.sharing.order_book import OrderBook

ADVICE = "Load the model again, or with copy_thread=False."


@dataclass(frozen=True)
class CopyDriver:
    """What a thread needs of the CUDA driver, as numbers."""

    copy_in: int
    """Address of ``cuMemcpyHtoDAsync``."""
    write_value: int
    """Address of ``cuStreamWriteValue32``."""
    stream: int
    """Where copies are put."""
    counter: int
    """Address on the GPU of an int32 that says how many copies are over."""


class Feeder(Watchers):
    """The thread that fills orders; between steps it sleeps, within one it watches the book.

    A copy that the driver refuses lets the GPU wait for none; `check` says so.

    Args:
        feed: the CPU target's ``feed_copies``, which must leave Python's lock to others.
        book: where orders come from; its memory must outlive the thread.
        driver: how copies are made.
        enter: makes the GPU the calling thread's.

    Raises:
        DeviceError: the thread did not start.
    """

    def __init__(
        self,
        feed: Callable[..., Any],
        book: OrderBook,
        driver: CopyDriver,
        enter: Callable[[], None],
    ) -> None:
        self._book = book
        state = _State(driver)
        run = partial(_feed, feed, (*book.host_tensors(), *state.tensors()), enter)
        self._answers = state.driver
        super().__init__(state, run, book.close, 1, "moec-copies")

    def check(self) -> None:
        """See that the thread works.

        Raises:
            DeviceError: it failed, or the driver refused a copy.
        """
        error = self._state.error
        if error is not None:
            raise DeviceError("The thread that copies experts failed.", f"{error}.", ADVICE) from error
        if self._answers[orders.STATUS]:
            answer = f"The driver answered {self._answers[orders.STATUS]}."
            raise DeviceError("An expert was not copied to the GPU.", answer, ADVICE)

    @property
    def made(self) -> int:
        """Copies that were put into the stream, or that nobody wanted any more."""
        return int(self._answers[orders.MADE])


class _State(WatchState):
    """What the thread has beside the book."""

    def __init__(self, driver: CopyDriver) -> None:
        super().__init__()
        self.driver = aligned_zeros((orders.DRIVER_WORDS,), np.int64)
        for word, value in (
            (orders.COPY_IN, driver.copy_in),
            (orders.WRITE_VALUE, driver.write_value),
            (orders.STREAM, driver.stream),
            (orders.COUNTER, driver.counter),
        ):
            self.driver[word] = value

    def tensors(self) -> tuple[Any, ...]:
        """The arguments control and driver, as ``feed_copies`` takes them."""
        return tensor_of(self.control), tensor_of(self.driver)


def _feed(feed: Callable[..., Any], arguments: tuple[Any, ...], enter: Callable[[], None]) -> None:
    enter()
    feed(*arguments)
