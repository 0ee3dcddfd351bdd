"""Products of a block's weights: those of a round wait in registers, or those of several in a ring of shared memory.

In registers a warp has ``unroll`` steps in flight, and loads the next one into the registers that a product has just
freed: across rounds of columns, and across tiles of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.products import Products
from moec.compiler.kernels.cuda.few.ring import ThroughRing
from moec.compiler.kernels.cuda.few.stream import WORDS
from moec.compiler.kernels.cuda.primitives import call, element, i32, registers
from moec.compiler.kernels.emit import load, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.few.lanes import Lane
    from moec.compiler.kernels.cuda.few.ring import Ring
    from moec.compiler.kernels.cuda.few.stream import Activations, Stream, Sums
    from moec.compiler.kernels.emit import Expr


def multiply(
    stream: Stream, lane: Lane, activations: Activations, sums: Sums, ring: Ring | None = None
) -> None:
    """Emit all products of a block; ``ring`` where its tiling has one."""
    products = Products(stream, lane, activations, sums)
    if ring is None:
        _ThroughRegisters(products).run()
    else:
        ThroughRing(products, ring).run()


class _ThroughRegisters:
    """The parts of ``multiply`` without a ring, and the registers that they share."""

    def __init__(self, products: Products) -> None:
        self.products, self.stream, self.tiling = products, products.stream, products.tiling
        self.weights = registers(WORDS * products.lines * self.tiling.unroll, "uint32")

    def run(self) -> None:
        products, activations = self.products, self.products.activations
        if self.stream.begin is not None:
            self.stream.begin(i32(0))
        products.aim(i32(0), i32(0))
        first = products.lane.column(self.tiling, i32(0))
        for slot in range(self.tiling.unroll):
            self._load(slot, first, None)
        activations.ready()
        for slot in range(self.tiling.unroll):
            activations.prefetch(slot, i32(0), first, products.inside(slot, first, None))
        tiles = self.stream.tiles
        with T.serial(i32(0), i32(tiles) if isinstance(tiles, int) else tiles) as tile:
            products.clear()
            with T.serial(i32(0), i32(products.rounds)) as round_:
                self._round(tile, round_)
            products.add_up(tile)

    def _round(self, tile: Expr, round_: Expr) -> None:
        products, activations = self.products, self.products.activations
        activations.prepare(tile, round_)
        if not products.single:
            wraps = T.bind(round_ + i32(1) == i32(products.rounds))
            next_round = T.bind(T.Select(wraps, i32(0), round_ + i32(1)))
            next_tile = T.bind(T.Select(wraps, tile + i32(1), tile))
            more = T.bind(next_tile < self.stream.tiles)
            column = products.lane.column(self.tiling, next_round)
            if self.stream.begin is not None:
                with when(tirx.all(more, wraps)):
                    self.stream.begin(next_tile)
            with when(more):
                products.aim(next_tile, next_round)
        for slot in range(self.tiling.unroll):
            products.step(slot, round_, self._words(slot))
            if not products.single:
                valid = self._load(slot, column, more)
                activations.prefetch(slot, next_tile, column, valid)

    def _load(self, slot: int, column: Expr, more: Expr | None) -> Expr | None:
        """Load the weights of one step; returns where that happens, ``None`` for everywhere."""
        products = self.products
        valid = products.inside(slot, column, more)
        for line in range(products.lines):
            target = element(self.weights, (slot * products.lines + line) * WORDS)
            address = products.address(slot, line)
            if valid is None:
                call("stream_16", target, address)
            else:
                call("stream_16_if", target, address, valid)
        return valid

    def _words(self, slot: int) -> list[list[Expr]]:
        first = slot * self.products.lines
        return [
            [load(self.weights, i32((first + line) * WORDS + word)) for word in range(WORDS)]
            for line in range(self.products.lines)
        ]
