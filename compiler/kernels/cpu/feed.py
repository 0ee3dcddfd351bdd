"""The host's side of a GPU's orders: a thread that puts copies into a stream, in one call from load to close.

``artifacts/words/orders.py`` says what lies where, ``kernels/cuda/slots/order.py`` is the other side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import mailbox, orders
from moec.compiler.kernels.cpu.atomics import atomics, load_acquire, store_release
from moec.compiler.kernels.cpu.driver_calls import FUNCTIONS, copy_in, write_value
from moec.compiler.kernels.cpu.watch import watch
from moec.compiler.kernels.emit import Argument, arguments, build, i64, keep, load, loop, store, when

if TYPE_CHECKING:
    from tvm import tirx

    from moec.compiler.kernels.emit import Buffer, Expr


def feed(*, machine: str) -> tirx.PrimFunc:
    """The kernel ``feed_copies(book [80], copies [257, 4], control [128], driver [8])``, all int64.

    A copy that the driver refuses ends it: the GPU is told to wait no longer.

    Args:
        machine: of the target, as ``uname -m`` says it.
    """

    def emit() -> None:
        book, copies, control, driver = arguments(
            Argument("book", (orders.BOOK_WORDS,), "int64"),
            Argument("copies", (orders.MOST_COPIES, orders.COPY_WORDS), "int64"),
            Argument("control", (mailbox.CONTROL_WORDS,), "int64"),
            Argument("driver", (orders.DRIVER_WORDS,), "int64"),
        )
        with atomics(machine, FUNCTIONS):
            watch(book, orders.POSTED, control, lambda number: _fill(number, book, copies, control, driver))

    return build(orders.FEED, emit, alone=False)


def _fill(number: Expr, book: Buffer, copies: Buffer, control: Buffer, driver: Buffer) -> None:
    """Bring what an order wants; of one that was cancelled nothing more, but each copy counts."""
    stream, counter = keep(load(driver, orders.STREAM)), keep(load(driver, orders.COUNTER))
    bring, write = keep(load(driver, orders.COPY_IN)), keep(load(driver, orders.WRITE_VALUE))
    with loop(keep(load(book, orders.COUNT))) as copy:
        row = keep(copy * i64(orders.COPY_WORDS))
        target, source, size = (
            keep(load(copies, row + i64(word))) for word in (orders.TARGET, orders.SOURCE, orders.SIZE)
        )
        wanted = T.And(load_acquire(book, orders.CANCELLED) != number, load(driver, orders.STATUS) == i64(0))
        with when(T.And(size > i64(0), wanted)):
            _check(copy_in(bring, target, source, size, stream), book, control, driver)
        with when(load(driver, orders.STATUS) == i64(0)):
            made = keep(load(driver, orders.MADE) + i64(1))
            _check(write_value(write, stream, counter, made), book, control, driver)
            store_release(driver, orders.MADE, made)


def _check(status: Expr, book: Buffer, control: Buffer, driver: Buffer) -> None:
    """Where the driver failed: say so, let the GPU wait no longer, and leave."""
    with when(T.And(status != i64(0), load(driver, orders.STATUS) == i64(0))):
        store(driver, orders.STATUS, status)
        store_release(book, orders.CLOSED, i64(1))
        store_release(control, mailbox.STOP, i64(1))
