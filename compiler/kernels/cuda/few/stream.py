"""Weights streamed into tensor cores, for at most eight tokens: the core of the decode kernels.

Weights are the left operand of ``mma.m16n8k16`` (16 rows), tokens the right one (8 columns, zero beyond T). A sum over
k may run in any order as long as both operands agree on it, so lane ``(g, t) = (lane / 4, lane % 4)`` loads 16
contiguous bytes, ``w[row + g][k + 8t ..]`` and ``w[row + g + 8][k + 8t ..]``, and holds what two products want. Weights
wait for their products in registers (``multiply.py``) or in shared memory (``ring.py``); every sum is added in an order
that depends neither on that nor on T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tvm import tirx

from moec.compiler.kernels.cuda.primitives import element, value

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cuda.few.tiling import Tiling
    from moec.compiler.kernels.emit import Buffer, Expr

WORDS = 4
"""Registers of 32 bits in one load."""


@dataclass(frozen=True)
class Split:
    """How float32 activations become two numbers of 16 bits whose sum is as good.

    ``hi = round(x * scale)`` and ``lo = round((x * scale - hi) * lift)``; their products are added up apart. bfloat16
    has float32's range. float16 is scaled so that activations up to 1,048,064 fit, and beyond that they saturate; and
    lifted so that the rest of small ones does not vanish.
    """

    scale: float
    lift: float
    largest: float | None


SPLITS = {"bfloat16": Split(1.0, 1.0, None), "float16": Split(2.0**-4, 2.0**11, 65504.0)}


class Activations(Protocol):
    """Where the right operand comes from."""

    def ready(self) -> None:
        """Emit what comes after the first weights are on their way: at the least, ``wait_previous``."""

    def prefetch(self, slot: int, tile: Expr, column: Expr, valid: Expr | None) -> None:
        """Emit loads for a later ``operands``: of the step of ``slot`` in a round that begins at ``column``."""

    def prepare(self, tile: Expr, round_: Expr) -> None:
        """Emit what precedes the products of a round."""

    def operands(self, slot: int, round_: Expr, /) -> tuple[list[Expr], list[Expr]]:
        """The four words of ``hi`` and of ``lo`` for the step of ``slot``."""


class Sums(Protocol):
    """Where the sums of a tile go."""

    def place(self, tile: Expr, token: Expr, /) -> Expr:
        """Where this lane's warp keeps those of a token."""

    def store(self, place: Expr, stream: int, half: int, total: Expr, /) -> None:
        """Keep a sum of this warp: of its group's row, or of that eight further down."""

    def done(self, tile: Expr, /) -> None:
        """Emit what the block does when all sums of a tile are kept."""


@dataclass(frozen=True)
class Stream:
    """The weights of a block: which rows, in which order."""

    tiling: Tiling
    dtype: str
    columns: int
    tokens: Expr
    """int32."""
    tiles: int | Expr
    """How many tiles this block takes."""
    locate: Callable[[Expr, int, int], Expr]
    """``(tile, stream, half)``: the address (int64) of the first weight in this lane's row ``half * 8 + g``."""
    begin: Callable[[Expr], None] | None = None
    """Called to emit what has to happen, in all threads of a block, before the first weight of a tile is read."""


def address_of(buffer: Buffer) -> Expr:
    """Where a buffer begins, as an int64."""
    return value("int64", "address", element(buffer, tirx.IntImm("int64", 0)))
