"""A layer's state as the kernels see it; see ``moec.artifacts.words.slots``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.primitives import element, value
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import div, i64, load, store

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr


@dataclass(frozen=True)
class State:
    """Reads and writes words of a state; numbers of experts and slots are int32 expressions."""

    buffer: Buffer
    """int64 ``[W]``."""
    experts: Expr
    """int64."""
    slots: Expr
    """int32."""

    @classmethod
    def of(cls, buffer: Buffer) -> State:
        """Read the sizes; after ``wait_previous``."""
        experts = settle(load(buffer, i64(words.EXPERTS)))
        return cls(buffer, experts, settle(T.cast(load(buffer, i64(words.SLOTS)), "int32")))

    def head(self, word: int) -> Expr:
        """A word whose place does not depend on the layer."""
        return load(self.buffer, i64(word))

    def set_head(self, word: int, value: Expr) -> None:
        """Write such a word."""
        store(self.buffer, i64(word), value)

    def at(self, first: int, number: Expr) -> Expr:
        """A word of an array that begins at the same place in every state."""
        return load(self.buffer, i64(first) + T.cast(number, "int64"))

    def set_at(self, first: int, number: Expr, value: Expr) -> None:
        """Write such a word."""
        store(self.buffer, i64(first) + T.cast(number, "int64"), value)

    def part(self, name: str, number: Expr) -> Expr:
        """A word of one of ``moec.artifacts.words.slots.PARTS``."""
        return load(self.buffer, self._place(name, number))

    def set_part(self, name: str, number: Expr, value: Expr) -> None:
        """Write such a word."""
        store(self.buffer, self._place(name, number), value)

    def arrived(self, fetch: Expr, part: Expr) -> Expr:
        """Where the pieces of a fetch that have arrived are counted, of its first part (0, int64) or second (1)."""
        place = i64(words.ARRIVED) + T.cast(fetch, "int64")
        return T.bind(address_of(self.buffer) + place * i64(8) + part * i64(4))

    def _place(self, name: str, number: Expr) -> Expr:
        turn = 1 + words.PARTS.index(name)
        each = div(self.experts + i64(7), 8) * i64(8)
        return i64(words.TABLE) + i64(turn) * each + T.cast(number, "int64")


def address_of(buffer: Buffer) -> Expr:
    """Where a buffer begins, int64."""
    return value("int64", "address", element(buffer, i64(0)))


def pieces_of(size_bytes: Expr) -> Expr:
    """int64: how many pieces so many bytes are fetched in."""
    return T.truncdiv(size_bytes + i64(words.PIECE_BYTES - 1), i64(words.PIECE_BYTES))
