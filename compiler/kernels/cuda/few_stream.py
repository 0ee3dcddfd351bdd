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

from moec.compiler.kernels.cpu.emit import load, store, when
from moec.compiler.kernels.cuda.few_tiling import FEW_TOKENS, LANES, STEP_COLUMNS, TILE_ROWS, Tiling
from moec.compiler.kernels.cuda.primitives import call, element, i32, mma, registers, shared, sync, value

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cpu.emit import Buffer, Expr

WORDS = 4
"""Registers of 32 bits in one load."""
SUM_STRIDE = 20
"""Between tokens in the memory through which warps add up: 16 rows, and 4 that keep its banks apart."""


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


def quotient(number: Expr, divisor: int) -> Expr:
    """``number / divisor`` for int32 that are not negative."""
    return T.truncdiv(number, i32(divisor))


def remainder(number: Expr, divisor: int) -> Expr:
    """``number % divisor`` for int32 that are not negative."""
    return T.truncmod(number, i32(divisor))


@dataclass(frozen=True)
class Lane:
    """A thread's place in its block; all int32."""

    thread: Expr
    group: Expr
    """Row of the left operand, and token of the right one: lane / 4."""
    part: Expr
    """Which 8 of a step's 32 columns: lane % 4."""
    row_warp: Expr
    column_warp: Expr

    @classmethod
    def of(cls, thread: Expr, tiling: Tiling) -> Lane:
        """The place of ``thread``."""
        warp, lane = T.bind(quotient(thread, LANES)), T.bind(remainder(thread, LANES))
        return cls(
            thread,
            T.bind(quotient(lane, 4)),
            T.bind(remainder(lane, 4)),
            T.bind(quotient(warp, tiling.column_warps)),
            T.bind(remainder(warp, tiling.column_warps)),
        )

    def column(self, tiling: Tiling, round_: Expr) -> Expr:
        """The first column that this lane loads in a round."""
        start = round_ * i32(tiling.round_columns)
        return T.bind(start + self.column_warp * i32(STEP_COLUMNS * tiling.unroll) + self.part * i32(8))


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


def multiply(
    stream: Stream,
    lane: Lane,
    activations: Activations,
    finish: Callable[[Expr, Expr, Expr, list[Expr]], None],
    partial: Buffer | None = None,
) -> None:
    """Emit all products of a block.

    Args:
        stream: the weights.
        lane: this thread.
        activations: the other operand.
        finish: called once to emit what happens to sums: ``(tile, row, token, sums)``, with a row among the
            ``16 * row_warps`` of a tile and one float32 sum a stream.
        partial: shared memory of ``partial_size`` float32, where the block has it already.
    """
    _Emitter(stream, lane, activations, partial).run(finish)


def partial_size(tiling: Tiling, *, one_tile: bool) -> int:
    """float32 of shared memory through which the warps of a block add up."""
    part = tiling.streams * FEW_TOKENS * SUM_STRIDE
    return (1 if one_tile else 2) * tiling.row_warps * tiling.column_warps * part


class _Emitter:
    """The parts of ``multiply``, and the registers that they share."""

    def __init__(self, stream: Stream, lane: Lane, activations: Activations, partial: Buffer | None) -> None:
        tiling = stream.tiling
        self.stream, self.lane, self.activations, self.tiling = stream, lane, activations, tiling
        self.rounds = tiling.rounds(stream.columns)
        self.exact = self.rounds * tiling.round_columns == stream.columns
        self.single = self.rounds == 1 and isinstance(stream.tiles, int) and stream.tiles == 1
        self.weights = registers(2 * WORDS * tiling.streams * tiling.unroll, "uint32")
        self.addresses = registers(2 * tiling.streams, "int64")
        self.sums = registers(2 * WORDS * tiling.streams)
        one_tile = isinstance(stream.tiles, int) and stream.tiles == 1
        self.part_size = tiling.streams * FEW_TOKENS * SUM_STRIDE
        self.bank_size = tiling.row_warps * tiling.column_warps * self.part_size
        self.banks = 1 if one_tile else 2
        self.partial = shared(self.banks * self.bank_size) if partial is None else partial

    def run(self, finish: Callable[[Expr, Expr, Expr, list[Expr]], None]) -> None:
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
            self._add_up(tile, finish)

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

    def _add_up(self, tile: Expr, finish: Callable[[Expr, Expr, Expr, list[Expr]], None]) -> None:
        lane, tiling = self.lane, self.tiling
        bank = i32(0) if self.banks == 1 else T.bind(T.bitwise_and(tile, i32(1)) * i32(self.bank_size))
        warp = T.bind(quotient(lane.thread, LANES))
        for column in range(2):
            token = T.bind(lane.part * i32(2) + i32(column))
            with when(token < self.stream.tokens):
                place = T.bind(bank + warp * i32(self.part_size) + token * i32(SUM_STRIDE) + lane.group)
                for stream in range(tiling.streams):
                    for half in range(2):
                        offset = stream * FEW_TOKENS * SUM_STRIDE + 8 * half
                        store(self.partial, place + i32(offset), self._sum(stream, 2 * half + column))
        sync()
        tile_rows = TILE_ROWS * tiling.row_warps
        count = T.bind(self.stream.tokens * i32(tile_rows))
        for first in range(0, FEW_TOKENS * tile_rows, tiling.threads):
            number = T.bind(lane.thread + i32(first))
            with when(number < count):
                row, token = T.bind(remainder(number, tile_rows)), T.bind(quotient(number, tile_rows))
                finish(tile, row, token, self._totals(bank, row, token))

    def _sum(self, stream: int, place: int) -> Expr:
        split = SPLITS[self.stream.dtype]
        hi = load(self.sums, i32(2 * WORDS * stream + place)) * T.float32(1 / split.scale)
        lo = load(self.sums, i32(2 * WORDS * stream + WORDS + place))
        return hi + lo * T.float32(1 / (split.scale * split.lift))

    def _totals(self, bank: Expr, row: Expr, token: Expr) -> list[Expr]:
        warps = self.tiling.column_warps
        place = quotient(row, TILE_ROWS) * i32(warps * self.part_size) + remainder(row, TILE_ROWS)
        place = T.bind(bank + place + token * i32(SUM_STRIDE))
        totals = []
        for stream in range(self.tiling.streams):
            first = stream * FEW_TOKENS * SUM_STRIDE
            total = T.bind(load(self.partial, place + i32(first)))
            for warp in range(1, warps):
                total = T.bind(total + load(self.partial, place + i32(first + warp * self.part_size)))
            totals.append(total)
        return totals


def address_of(buffer: Buffer) -> Expr:
    """Where a buffer begins, as an int64."""
    return value("int64", "address", element(buffer, tirx.IntImm("int64", 0)))
