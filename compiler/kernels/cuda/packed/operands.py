"""What packed products are asked for: which weights, where activations come from, where sums go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cuda.few.tiling import Tiling
    from moec.compiler.kernels.cuda.packed.rows import PackedRow
    from moec.compiler.kernels.emit import Buffer, Expr


class PackedActivations(Protocol):
    """Where the right operand comes from, in the order of ``OperandOrder``; tokens are taken one after the other."""

    def ready(self) -> None:
        """Emit what comes after the first weights are on their way: at the least, ``wait_previous``."""

    def prepare(self, tile: Expr, round_: Expr) -> None:
        """Emit what precedes the products of a round."""

    def count(self, tile: Expr, /) -> Expr:
        """How many tokens meet a tile, int32."""

    def token(self, tile: Expr, number: Expr, /) -> Expr:
        """Which of the eight the ``number``-th of them is."""

    def arrive(self) -> None:
        """Emit what precedes the products of a round with one token."""

    def operands(self, slot: int, round_: Expr, number: Expr, /) -> list[Expr]:
        """This lane's words of a step's activations."""

    def leave(self) -> None:
        """Emit what follows the products of a round with one token."""


class PackedSums(Protocol):
    """Where the sums of warps go, and what becomes of them."""

    memory: Buffer
    """float32, in shared memory."""

    def place(self, tile: Expr, token: Expr, number: Expr, /) -> Expr:
        """Where this lane's warp has its group's row of the first stream, for the ``number``-th token of a tile."""

    def at(self, place: Expr, stream: int, half: int, /) -> Expr:
        """The element of a stream and of the row, or of that eight further down."""

    def done(self, tile: Expr, /) -> None:
        """Emit what follows the last product of a tile, in all threads of a block."""


@dataclass(frozen=True)
class PackedStream:
    """The weights of a block: which rows, in which order."""

    tiling: Tiling
    row: PackedRow
    tokens: Expr
    """int32."""
    tiles: int | Expr
    """How many tiles this block takes."""
    locate: Callable[[Expr, int, int], Expr]
    """``(tile, stream, half)``: the address (int64) of this lane's row ``half * 8 + g``."""
    begin: Callable[[Expr], None] | None = None
    """Called to emit what has to happen, in all threads of a block, before the first weight of a tile is read."""
