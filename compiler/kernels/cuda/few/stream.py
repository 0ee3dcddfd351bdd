"""Weights streamed through registers into tensor cores, for at most eight tokens: the core of the decode kernels.

Weights are the left operand of ``mma.m16n8k16`` (16 rows), tokens the right one (8 columns, zero beyond T). A sum over
k may run in any order as long as both operands agree on it, so lane ``(g, t) = (lane / 4, lane % 4)`` loads 16
contiguous bytes, ``w[row + g][k + 8t ..]`` and ``w[row + g + 8][k + 8t ..]``, and holds what two products want. A warp
has ``unroll`` such steps in flight, and loads the next one into the registers that a product has just freed: across
rounds of columns, and across tiles of rows. Every sum is added in an order that does not depend on T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.tiling import STEP_COLUMNS, Tiling
from moec.compiler.kernels.cuda.primitives import call, element, i32, mma, registers, value
from moec.compiler.kernels.emit import load, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cuda.few.lanes import Lane
    from moec.compiler.kernels.cuda.few.sums import FewSums
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


def multiply(stream: Stream, lane: Lane, activations: Activations, sums: FewSums) -> None:
    """Emit all products of a block."""
    _Emitter(stream, lane, activations, sums).run()


class _Emitter:
    """The parts of ``multiply``, and the registers that they share."""

    def __init__(self, stream: Stream, lane: Lane, activations: Activations, ending: FewSums) -> None:
        tiling = stream.tiling
        self.stream, self.lane, self.activations, self.tiling = stream, lane, activations, tiling
        self.rounds = tiling.rounds(stream.columns)
        self.exact = self.rounds * tiling.round_columns == stream.columns
        self.single = self.rounds == 1 and isinstance(stream.tiles, int) and stream.tiles == 1
        self.weights = registers(2 * WORDS * tiling.streams * tiling.unroll, "uint32")
        self.addresses = registers(2 * tiling.streams, "int64")
        self.sums = registers(2 * WORDS * tiling.streams)
        self.ending = ending

    def run(self) -> None:
        if self.stream.begin is not None:
            self.stream.begin(i32(0))
        self._aim(i32(0), i32(0))
        first = self.lane.column(self.tiling, i32(0))
        for slot in range(self.tiling.unroll):
            self._load(slot, first, None)
        self.activations.ready()
        for slot in range(self.tiling.unroll):
            self.activations.prefetch(slot, i32(0), first, self._inside(slot, first, None))
        tiles = self.stream.tiles
        with T.serial(i32(0), i32(tiles) if isinstance(tiles, int) else tiles) as tile:
            for place in range(2 * WORDS * self.tiling.streams):
                store(self.sums, i32(place), T.float32(0))
            with T.serial(i32(0), i32(self.rounds)) as round_:
                self._round(tile, round_)
            self._add_up(tile)

    def _round(self, tile: Expr, round_: Expr) -> None:
        self.activations.prepare(tile, round_)
        if not self.single:
            wraps = T.bind(round_ + i32(1) == i32(self.rounds))
            next_round = T.bind(T.Select(wraps, i32(0), round_ + i32(1)))
            next_tile = T.bind(T.Select(wraps, tile + i32(1), tile))
            more = T.bind(next_tile < self.stream.tiles)
            column = self.lane.column(self.tiling, next_round)
            if self.stream.begin is not None:
                with when(tirx.all(more, wraps)):
                    self.stream.begin(next_tile)
            with when(more):
                self._aim(next_tile, next_round)
        for slot in range(self.tiling.unroll):
            self._products(slot, round_)
            if not self.single:
                valid = self._load(slot, column, more)
                self.activations.prefetch(slot, next_tile, column, valid)

    def _aim(self, tile: Expr, round_: Expr) -> None:
        """Set the addresses of this lane's first loads in a round."""
        offset = T.bind(T.cast(self.lane.column(self.tiling, round_), "int64") * T.int64(2))
        for stream in range(self.tiling.streams):
            for half in range(2):
                address = self.stream.locate(tile, stream, half) + offset
                store(self.addresses, i32(2 * stream + half), address)

    def _load(self, slot: int, column: Expr, more: Expr | None) -> Expr | None:
        """Load the weights of one step; returns where that happens, ``None`` for everywhere."""
        valid = self._inside(slot, column, more)
        for place in range(2 * self.tiling.streams):
            target = element(self.weights, (slot * 2 * self.tiling.streams + place) * WORDS)
            address = load(self.addresses, i32(place)) + T.int64(2 * STEP_COLUMNS * slot)
            if valid is None:
                call("stream_16", target, address)
            else:
                call("stream_16_if", target, address, valid)
        return valid

    def _inside(self, slot: int, column: Expr, more: Expr | None) -> Expr | None:
        if self.exact:
            return more
        inside = column + i32(STEP_COLUMNS * slot) < i32(self.stream.columns)
        return T.bind(inside if more is None else tirx.all(more, inside))

    def _products(self, slot: int, round_: Expr) -> None:
        parts = self.activations.operands(slot, round_)
        for stream in range(self.tiling.streams):
            first = (slot * 2 * self.tiling.streams + 2 * stream) * WORDS
            low = [load(self.weights, i32(first + i)) for i in range(WORDS)]
            high = [load(self.weights, i32(first + WORDS + i)) for i in range(WORDS)]
            for pair in (0, 2):
                left = [low[pair], high[pair], low[pair + 1], high[pair + 1]]
                for part, words in enumerate(parts):
                    sums = element(self.sums, (2 * stream + part) * WORDS)
                    mma(self.stream.dtype, sums, left, words[pair : pair + 2])

    def _add_up(self, tile: Expr) -> None:
        ending = self.ending
        for column in range(2):
            token = T.bind(self.lane.part * i32(2) + i32(column))
            with when(token < self.stream.tokens):
                place = ending.place(tile, token)
                for stream in range(self.tiling.streams):
                    for half in range(2):
                        ending.store(place, stream, half, self._sum(stream, 2 * half + column))
        ending.done(tile)

    def _sum(self, stream: int, place: int) -> Expr:
        split = SPLITS[self.stream.dtype]
        hi = load(self.sums, i32(2 * WORDS * stream + place)) * T.float32(1 / split.scale)
        lo = load(self.sums, i32(2 * WORDS * stream + WORDS + place))
        return hi + lo * T.float32(1 / (split.scale * split.lift))


def address_of(buffer: Buffer) -> Expr:
    """Where a buffer begins, as an int64."""
    return value("int64", "address", element(buffer, tirx.IntImm("int64", 0)))
