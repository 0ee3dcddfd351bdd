"""Weights on their way through a ring in shared memory, for at most eight tokens.

What a lane multiplies it copies itself, with ``cp.async``, to a place that no other thread touches: it waits for its
own copies alone, with no barrier, and what it has read it overwrites. So a ring is more registers than a thread has:
steps are in flight whatever the products need, across tiles of rows, while a thread has 64 to 80 registers and the
next launch's blocks fit beside these, with their first weights on the way too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.stream import WORDS
from moec.compiler.kernels.cuda.few.tokens import PAIR_BYTES
from moec.compiler.kernels.cuda.primitives import call, element, i32, registers
from moec.compiler.kernels.emit import load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.few.products import Products
    from moec.compiler.kernels.cuda.few.tiling import Tiling
    from moec.compiler.kernels.emit import Buffer, Expr

PIECE = 8
"""16-bit weights that a lane copies at a time."""
MOST_AHEAD = 8
"""Steps of a ring: so many groups of copies can be told apart."""
REGISTERS = 64 << 10
"""Of a multiprocessor."""
MOST_ACTIVATION_BYTES = 16 << 10
"""Of shared memory, beside a ring: those of one token where they are no more."""


@dataclass(frozen=True)
class Ring:
    """Shared memory for the steps that are in flight."""

    memory: Buffer
    """uint16."""
    start: int
    """The first element that is the ring's, a multiple of ``PIECE``; ``ring_elements`` follow."""


def through_ring(
    tiling: Tiling, columns: int, ring_bytes: int, *, registers_each: int, unroll: int = 1
) -> Tiling:
    """The tiling with a ring instead of registers: the same warps, rounds of at most ``unroll`` steps.

    A round is what activations are asked for together, and addresses made; the ring goes by steps.

    Args:
        tiling: with weights in registers.
        columns: of the weights.
        ring_bytes: that a ring of at least two steps may have.
        registers_each: of a thread, at least: as many blocks as leave it so many are held at once.
        unroll: steps of a round, or fewer where that wastes less of the last one.
    """

    def waste(steps: int) -> int:
        shorter = replace(tiling, unroll=steps)
        return shorter.rounds(columns) * shorter.round_columns

    blocks = max(1, REGISTERS // (registers_each * tiling.threads))
    short = replace(tiling, unroll=min(range(unroll, 0, -1), key=waste), blocks=blocks)
    ahead = min(MOST_AHEAD, max(2, ring_bytes // (2 * _step_elements(short))))
    one_token = PAIR_BYTES * short.rounds(columns) * short.round_columns
    return replace(short, ring=ahead, shared_bytes=min(MOST_ACTIVATION_BYTES, one_token))


def ring_elements(tiling: Tiling) -> int:
    """uint16 of shared memory that a ring takes."""
    return tiling.ring * _step_elements(tiling)


def _step_elements(tiling: Tiling) -> int:
    return PIECE * 2 * tiling.streams * tiling.threads


class ThroughRing:
    """The parts of ``multiply`` with a ring."""

    def __init__(self, products: Products, ring: Ring) -> None:
        self.products, self.ring, self.stream, self.tiling = products, ring, products.stream, products.tiling
        self.step_elements = _step_elements(self.tiling)
        self.place = registers(1, "int32")
        self.words = registers(WORDS * products.lines, "uint32")

    def run(self) -> None:
        """Emit all products of a block."""
        products, activations, tiles = self.products, self.products.activations, self.stream.tiles
        count = i32(tiles) if isinstance(tiles, int) else tiles
        rounds = T.bind(count * i32(products.rounds))
        own = T.bind(i32(self.ring.start) + products.lane.thread * i32(PIECE))
        for number in range(self.tiling.ring):
            round_, slot = divmod(number, self.tiling.unroll)
            self._copy(i32(round_), slot, own + i32(number * self.step_elements), rounds)
        activations.ready()
        first = products.lane.column(self.tiling, i32(0))
        for slot in range(self.tiling.unroll):
            activations.prefetch(slot, i32(0), first, products.inside(slot, first, None))
        store(self.place, 0, own)
        with T.serial(i32(0), count) as tile:
            products.clear()
            with T.serial(i32(0), i32(products.rounds)) as round_:
                self._round(tile, round_, own, rounds)
            products.add_up(tile)

    def _round(self, tile: Expr, round_: Expr, own: Expr, rounds: Expr) -> None:
        products, activations = self.products, self.products.activations
        activations.prepare(tile, round_)
        number = T.bind(tile * i32(products.rounds) + round_)
        following, next_round = self._split(number + i32(1))
        column = products.lane.column(self.tiling, next_round)
        more = T.bind(number + i32(1) < rounds)
        end = T.bind(own + i32(self.tiling.ring * self.step_elements))
        for slot in range(self.tiling.unroll):
            call("copy_wait", i32(self.tiling.ring - 1))
            place = T.bind(load(self.place, 0))
            products.step(slot, round_, self._read(place))
            activations.prefetch(slot, following, column, products.inside(slot, column, more))
            later, later_slot = divmod(slot + self.tiling.ring, self.tiling.unroll)
            self._copy(T.bind(number + i32(later)), later_slot, place, rounds)
            behind = T.bind(place + i32(self.step_elements))
            store(self.place, 0, T.Select(behind == end, own, behind))

    def _split(self, number: Expr) -> tuple[Expr, Expr]:
        """The tile and the round of a number."""
        rounds = i32(self.products.rounds)
        return T.bind(T.truncdiv(number, rounds)), T.bind(T.truncmod(number, rounds))

    def _copy(self, number: Expr, slot: int, place: Expr, rounds: Expr) -> None:
        """Start copying what this lane multiplies in a step, if there is such a round; steps come in order."""
        products = self.products
        with when(number < rounds):
            tile, round_ = self._split(number)
            if slot == 0:
                if self.stream.begin is not None:
                    with when(round_ == i32(0)):
                        self.stream.begin(tile)
                products.aim(tile, round_)
            valid = products.inside(slot, products.lane.column(self.tiling, round_), None)
            for line in range(products.lines):
                target = element(self.ring.memory, place + i32(self._offset(line)))
                address = products.address(slot, line)
                if valid is None:
                    call("copy_stream_16", target, address)
                else:
                    call("copy_stream_16_if", target, address, valid)
        call("copy_commit")

    def _read(self, place: Expr) -> list[list[Expr]]:
        """The words of a step, of each line."""
        lines = range(self.products.lines)
        for line in lines:
            source = element(self.ring.memory, place + i32(self._offset(line)))
            call("load_16", element(self.words, WORDS * line), source)
        return [[load(self.words, i32(WORDS * line + word)) for word in range(WORDS)] for line in lines]

    def _offset(self, line: int) -> int:
        """Of a line, from a lane's place in a step on."""
        return line * PIECE * self.tiling.threads
