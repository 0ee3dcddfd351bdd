"""Experts that are still on their way when the kernels that need them begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.primitives import call, i32, sync
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.state import State, pieces_of
from moec.compiler.kernels.emit import i64, when

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr


@dataclass(frozen=True)
class Arrivals:
    """What ``fetch_experts`` says while it runs beside the kernels of the experts."""

    state: State

    @classmethod
    def of(cls, state: Buffer) -> Arrivals:
        """Of the layer whose state this is; at the beginning of a kernel."""
        return cls(State.of(state))

    def entry(self, number: Expr) -> Expr:
        """The choice (int32) that comes ``number``-th: those whose experts are there are the first."""
        return settle(T.cast(self.state.at(words.ORDER, number), "int32"))

    def position(self, entry: Expr) -> Expr:
        """The place (int32) of a choice in this order."""
        return T.cast(self.state.at(words.POSITION, entry), "int32")

    def wait(self, expert: Expr, part: int, thread: Expr) -> None:
        """Wait, all threads of a block, for what the first (0) or the second (1) product reads of an expert."""
        fetch = settle(self.state.part("fetch", expert))
        with when(fetch >= i64(0)):
            with when(thread == i32(0)):
                middle = self.state.head(words.SECOND)
                size = middle if part == 0 else self.state.head(words.STRIDE) - middle
                call("wait_count", self.state.arrived(fetch, i64(part)), T.cast(pieces_of(size), "int32"))
            sync()
