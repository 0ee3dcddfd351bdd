"""Sums over the warps of a block, through shared memory that is read in pieces of 16 bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.operands import settled
from moec.compiler.kernels.cuda.primitives import LANES, call, element, i32, registers, shared, sync
from moec.compiler.kernels.emit import load, store

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr

FOUR = 4
"""float32 numbers in 16 bytes."""


def four(buffer: Buffer, place: Expr) -> list[Expr]:
    """Four neighbours of shared memory from a multiple of four on: TVM would read them one by one."""
    words = registers(FOUR, "uint32")
    call("load_16", element(words, 0), element(buffer, place))
    return [T.bind(T.reinterpret("float32", load(words, number))) for number in range(FOUR)]


class WarpSums:
    """Each lane's numbers, summed over warps. Two sets of memory, so that one barrier a token does.

    Args:
        warps: of the block.
        width: numbers of each thread, 1 or 2.
    """

    def __init__(self, warps: int, width: int) -> None:
        self.warps, self.width = warps, width
        self.piece = min(FOUR, warps * width)
        self.size = warps * width * LANES
        self.memory = shared(2 * self.size) if warps > 1 else None

    def over_warps(self, parts: Buffer, warp: Expr, lane: Expr, token: Expr) -> list[Expr]:
        """The sums of ``parts``, in every warp; ``token`` goes up by one from call to call."""
        if self.memory is None:
            return [T.bind(load(parts, part)) for part in range(self.width)]
        base = settled(T.truncmod(token, i32(2)) * i32(self.size) + lane * i32(self.piece))
        together = self.piece // self.width  # warps whose numbers lie side by side
        own = T.truncdiv(warp, i32(together)) * i32(self.piece * LANES)
        place = settled(base + own + T.truncmod(warp, i32(together)) * i32(self.width))
        for part in range(self.width):
            store(self.memory, place + i32(part), load(parts, part))
        sync()
        totals: list[Expr | None] = [None] * self.width
        for first in range(0, self.size, self.piece * LANES):
            for number, value in enumerate(self._piece(base + i32(first))):
                before = totals[number % self.width]
                totals[number % self.width] = value if before is None else T.bind(before + value)
        return totals

    def _piece(self, place: Expr) -> list[Expr]:
        if self.piece == FOUR:
            return four(self.memory, place)
        return [T.bind(load(self.memory, place + i32(number))) for number in range(self.piece)]
