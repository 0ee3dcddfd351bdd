"""A layer's ``ahead`` block as the kernels see it; see ``moec.artifacts.words.ahead``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.emit import i64, load, store

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr


@dataclass(frozen=True)
class AheadWords:
    """Reads and writes words of a block."""

    buffer: Buffer
    """int64 ``[A]``."""

    def at(self, first: int, number: Expr | int = 0) -> Expr:
        """A word."""
        return load(self.buffer, i64(first) + T.cast(number, "int64"))

    def set_at(self, first: int, number: Expr | int, value: Expr) -> None:
        """Write a word."""
        store(self.buffer, i64(first) + T.cast(number, "int64"), value)

    def add(self, word: int, more: Expr) -> None:
        """Count; for one thread."""
        store(self.buffer, i64(word), load(self.buffer, i64(word)) + T.cast(more, "int64"))
