"""What a GPU knows of the copies that it ordered: whether they are over. See ``moec.artifacts.words.orders``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import orders
from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.primitives import element, i32, registers, value
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import at_address, i64, load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.slots.state import State
    from moec.compiler.kernels.emit import Buffer, Expr

HALF, WHOLE = 1 << 31, 1 << 32
"""Of the numbers by which copies are counted."""


def are_over(notes: Buffer, copies: Expr) -> Expr:
    """Whether so many copies are over; what they brought can then be read."""
    return _has_reached(value("int64", "acquire_system", element(notes, orders.COPIED)), copies)


def copies_are_late(state: State) -> Expr:
    """Int32: 1 where copies are under way at the beginning of a layer: all that are in time are over by then."""
    late, address = registers(1, "int32"), settle(state.head(words.NOTES))
    store(late, 0, i32(0))
    with when(address != i64(0)):
        notes = at_address(address, orders.NOTES_WORDS, "int64")
        over = _has_reached(load(notes, orders.COPIED), load(notes, orders.ORDERED))
        store(late, 0, T.cast(T.Not(over), "int32"))
    return settle(load(late, 0))


def _has_reached(copied: Expr, copies: Expr) -> Expr:
    return T.truncmod(copied - copies + i64(1 << 62), i64(WHOLE)) < i64(HALF)
