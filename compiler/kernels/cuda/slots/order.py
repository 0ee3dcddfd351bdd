"""Missing experts by the GPU's copy engine: what ``fetch_experts`` does, with copies that the host puts into a stream.

One block makes the order and counts the pieces as its copies end, so that whoever computes waits as for
``fetch_experts``. The first pieces it leaves to blocks that read host memory while the host takes notice. Copies that
do not come in time it makes itself. A last expert comes in two parts, so that its first product need not wait for all
of it; for each copy the engine pauses 3 to 4 us, so others come in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import orders
from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.primitives import (
    call,
    element,
    i32,
    launch,
    launch_next,
    registers,
    shared,
    sync,
    value,
    wait_previous,
)
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.fetch import (
    AHEAD_BLOCKS,
    BLOCKS,
    bring_piece,
    brought_ahead,
    from_ahead,
)
from moec.compiler.kernels.cuda.slots.notes import are_over
from moec.compiler.kernels.cuda.slots.pieces import COPY_THREADS, Pieces, share_of
from moec.compiler.kernels.cuda.slots.state import State
from moec.compiler.kernels.cuda.threads import each_of
from moec.compiler.kernels.emit import (
    Argument,
    arguments,
    build,
    either,
    i64,
    load,
    loop,
    store,
    symbol,
    when,
)

if TYPE_CHECKING:
    from tvm import tirx

    from moec.compiler.kernels.emit import Buffer, Expr

HEAD_PIECES = 32
"""Of the first expert that blocks bring until the copy engine begins: some 10 us of the link."""
LOOKS = 64
"""At the number of copies between two at the clock and at what the host says."""


def order(
    read_blocks: int = BLOCKS, head_pieces: int = HEAD_PIECES, ahead_blocks: int = AHEAD_BLOCKS
) -> tirx.PrimFunc:
    """The kernel ``order_experts(state [W], notes [32], book [80], copies [257, 4])``, all int64.

    ``book`` and ``copies`` lie in pinned host memory. Whatever ran before it is over when the kernel after it begins,
    but it itself may not be. An expert's stride is a multiple of 16 bytes.
    """

    def body() -> None:
        size = symbol("W")
        state_buffer, notes, book, copies = arguments(
            Argument("state", (size,), "int64"),
            Argument("notes", (orders.NOTES_WORDS,), "int64"),
            Argument("book", (orders.BOOK_WORDS,), "int64"),
            Argument("copies", (orders.MOST_COPIES, orders.COPY_WORDS), "int64"),
        )
        with launch((1 + read_blocks + ahead_blocks,), COPY_THREADS) as ((block,), thread):
            wait_previous()
            launch_next()
            state = State.of(state_buffer)
            pieces = Pieces.of(state)
            own = _Order(state, pieces, notes, book, copies, head_pieces, thread)
            reader, ahead = settle(block - i32(1)), settle(block - i32(1 + read_blocks))
            either(
                block == i32(0),
                own.partner,
                lambda: either(
                    ahead < i32(0),
                    lambda: own.bring_head(reader, read_blocks),
                    lambda: from_ahead(state, pieces, ahead, ahead_blocks, thread),
                ),
            )

    return build(orders.ORDER, body)


@dataclass(frozen=True)
class _Order:
    """What one layer orders: a copy of each missing expert, but for the last one of each of its parts."""

    state: State
    pieces: Pieces
    notes: Buffer
    book: Buffer
    copies: Buffer
    head_pieces: int
    thread: Expr

    def bring_head(self, block: Expr, blocks: int) -> None:
        """The first pieces of the first fetch, but for those that were brought ahead."""
        which = i64(0)
        with when(self.state.head(words.FETCHES) > which):
            first = brought_ahead(self.state, which)
            for number in share_of(i64(block), blocks, settle(self._begin(which) - first)):
                self._bring(which, settle(first + number))

    def partner(self) -> None:
        """By the block that is the host's partner: make the order, say what has arrived, bring what has not."""
        fetches = settle(self.state.head(words.FETCHES))
        count = settle(T.Select(fetches > i64(0), fetches + i64(1), i64(0)))
        came, makes = shared(1, "int64"), shared(1, "int32")
        ordered = settle(load(self.notes, orders.ORDERED))
        with when(self.thread == i32(0)):
            store(came, 0, i64(0))
            store(makes, 0, T.cast(are_over(self.notes, ordered), "int32"))
        sync()
        with when(load(makes, 0) == i32(1)):
            for number in each_of(self.thread, COPY_THREADS, T.cast(count, "int32")):
                self._write(i64(number), fetches)
        sync()
        with when(T.And(self.thread == i32(0), T.And(load(makes, 0) == i32(1), count > i64(0)))):
            self._post(count, ordered)
            self._await(count, fetches, ordered, came)
        sync()
        with loop(settle(count - load(came, 0))) as late:
            which, first, end = self._span(settle(load(came, 0) + late), fetches)
            with loop(settle(T.max(end - first, i64(0)))) as piece:
                self._bring(which, settle(first + piece))

    def _post(self, count: Expr, ordered: Expr) -> None:
        sent = settle(load(self.notes, orders.SENT) + i64(1))
        store(self.book, orders.COUNT, count)
        call("release_system", element(self.book, orders.POSTED), sent)
        store(self.notes, orders.SENT, sent)
        store(self.notes, orders.ORDERED, ordered + count)

    def _await(self, count: Expr, fetches: Expr, ordered: Expr, came: Buffer) -> None:
        """Count in ``came`` the copies that are over, and the pieces of each, while they come in time."""
        looking, since = registers(1, "int32"), registers(1, "int64")
        store(looking, 0, i32(1))
        store(since, 0, value("int64", "nanoseconds"))
        with T.While(load(looking, 0) != i32(0)):
            with loop(LOOKS), when(load(looking, 0) != i32(0)):
                number = settle(load(came, 0))
                with when(are_over(self.notes, ordered + number + i64(1))):
                    self._count(number, fetches)
                    store(since, 0, value("int64", "nanoseconds"))
                    store(came, 0, number + i64(1))
                    store(looking, 0, T.cast(number + i64(1) < count, "int32"))
            with when(load(looking, 0) != i32(0)):
                closed = value("int64", "acquire_system", element(self.book, orders.CLOSED))
                patience = value("int64", "acquire_system", element(self.book, orders.PATIENCE))
                now = value("int64", "nanoseconds")
                with when(T.Or(closed != i64(0), now - load(since, 0) > patience)):
                    self._cancel()
                    store(looking, 0, i32(0))

    def _cancel(self) -> None:
        store(self.notes, orders.LATE, load(self.notes, orders.LATE) + i64(1))
        call("release_system", element(self.book, orders.CANCELLED), load(self.notes, orders.SENT))

    def _begin(self, which: Expr) -> Expr:
        """The first piece of a fetch that the copy engine brings."""
        head = T.min(i64(self.head_pieces), self.pieces.first)
        ahead = brought_ahead(self.state, which)
        return settle(T.max(ahead, T.Select(which == i64(0), head, i64(0))))

    def _span(self, number: Expr, fetches: Expr) -> tuple[Expr, Expr, Expr]:
        """Of a copy: its fetch, its first piece, and the one after its last."""
        which = settle(T.min(number, fetches - i64(1)))
        begin, middle, end = self._begin(which), self.pieces.first, self.pieces.count
        first = T.Select(number == fetches, T.max(begin, middle), begin)
        return which, settle(first), settle(T.Select(number == fetches - i64(1), middle, end))

    def _write(self, number: Expr, fetches: Expr) -> None:
        which, first, last = self._span(number, fetches)
        end = T.Select(last == self.pieces.first, self.pieces.middle, self.pieces.stride)
        start = settle(T.min(self.pieces.start(first), end))
        row = settle(number * i64(orders.COPY_WORDS))
        for word, own in (
            (orders.TARGET, self.state.at(words.TARGET, which) + start),
            (orders.SOURCE, self.state.at(words.SOURCE, which) + start),
            (orders.SIZE, end - start),
        ):
            store(self.copies, row + i64(word), own)
        counter = element(self.notes, orders.FED_BYTES)
        call("atomic_add_wide", counter, T.cast(end - start, "uint64"))

    def _count(self, number: Expr, fetches: Expr) -> None:
        """The pieces of a copy that is over have arrived."""
        which, first, end = self._span(number, fetches)
        middle = self.pieces.first
        for second, pieces in enumerate(
            (T.min(end, middle) - T.min(first, middle), T.max(end, middle) - T.max(first, middle))
        ):
            with when(pieces > i64(0)):
                call("signal", self.state.arrived(which, i64(second)), T.cast(pieces, "int32"))

    def _bring(self, which: Expr, piece: Expr) -> None:
        start, second = settle(self.pieces.start(piece)), T.cast(piece >= self.pieces.first, "int64")
        source = settle(self.state.at(words.SOURCE, which) + start)
        bring_piece(self.state, which, second, source, start, self.pieces.end(piece), self.thread)
