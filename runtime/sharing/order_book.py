"""A GPU's orders of copies, over memory that both sides can read and write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.artifacts.words import orders
from moec.runtime.device import View
from moec.runtime.tensors import array_at, tensor_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

_COPIES_OFFSET = 8 * orders.BOOK_WORDS
BOOK_BYTES = _COPIES_OFFSET + 8 * orders.MOST_COPIES * orders.COPY_WORDS
"""Of the memory that it takes."""


class OrderBook:
    """Tensors of both sides over one block; whoever makes it keeps the memory.

    Args:
        address: of ``BOOK_BYTES`` of pinned host memory, the same for the CPU and the GPU; a multiple of 64.
        patience_ns: nanoseconds that the GPU waits for the next copy.
    """

    def __init__(self, address: int, patience_ns: int) -> None:
        self.book = View(address, "int64", (orders.BOOK_WORDS,))
        self.copies = View(address + _COPIES_OFFSET, "int64", (orders.MOST_COPIES, orders.COPY_WORDS))
        self.words: NDArray[Any] = array_at(*self.book)
        """int64, see `moec.artifacts.words.orders`."""
        self.words[:] = 0
        array_at(*self.copies)[:] = 0
        self.words[orders.PATIENCE] = patience_ns

    def host_tensors(self) -> tuple[Any, ...]:
        """The arguments book and copies, as ``feed_copies`` takes them."""
        return tensor_at(*self.book), tensor_at(*self.copies)

    def close(self) -> None:
        """Let the GPU wait for no copy, now and from now on."""
        self.words[orders.CLOSED] = 1

    @property
    def cancelled_order(self) -> int:
        """The last order that the GPU did not wait for, 0 where there is none; right once the step is finished."""
        return int(self.words[orders.CANCELLED])
