"""Packed weights on their way into a tile of shared memory: loaded a step ahead, dequantized, written as 16 bits.

A thread has 16 bytes of codes of every so many rows. While tensor cores multiply one stage, it turns the codes of a
later one, which it loaded a step before, into float16: a code's value times the scale of its group and ``LIFT``,
rounded once. The other operand is divided by ``LIFT``, see ``rounding.Rounding``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.packed.codes import SPLIT, TYPE, Zero, widening
from moec.compiler.kernels.cuda.packed.rows import LOAD_BYTES
from moec.compiler.kernels.cuda.primitives import i32, value
from moec.compiler.kernels.emit import load, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cuda.packed.rows import PackedRow
    from moec.compiler.kernels.emit import Buffer, Expr

WORDS = 4
LIFT = 1 / SPLIT.scale
PIECE = 8
"""16-bit numbers in the 16 bytes that are written at once."""


@dataclass(frozen=True)
class PackedRows:
    """Rows of a quantized matrix in global memory, as a block sees them; see ``tiles.Rows``."""

    address: Expr
    """int64; row r of the tile begins ``16 * offset(r)`` bytes further on."""
    offset: Callable[[Expr], Expr]
    row: PackedRow
    left: Expr | None = None

    @property
    def depth(self) -> int:
        """Columns."""
        return self.row.columns


@dataclass(frozen=True)
class Room:
    """The tile that is filled, and who fills it."""

    memory: Buffer
    place: Callable[[Expr, Expr], Expr]
    """From a row of the tile and a piece of 8 columns to the byte of a stage's memory where it lies, int32."""
    stage_bytes: int
    rows: int
    depth: int
    """Columns of a stage: 32 or 64."""
    thread: Expr
    threads: int


class PackedCopy:
    """A thread's share of the filling of a tile.

    Args:
        rows: of the matrix.
        room: the tile.
        steps: how many stages there are to fill, for each term.
        terms: how often.
    """

    def __init__(self, rows: PackedRows, room: Room, steps: int, terms: int = 1) -> None:
        self.rows, self.room, self.each, self.steps = rows, room, steps, steps * terms
        self.loads = room.depth // rows.row.unit
        self.stride = room.threads // self.loads
        self.turns = -(-room.rows // self.stride)
        self.load = T.bind(room.thread % i32(self.loads))
        first = T.bind(room.thread // i32(self.loads))
        self.numbers = [T.bind(first + i32(turn * self.stride)) for turn in range(self.turns)]
        self.starts = cuda.registers(self.turns, "int64")
        for turn, number in enumerate(self.numbers):
            inside = T.min(number, i32(room.rows - 1)) if self._beyond(turn) else number
            place = T.cast(rows.offset(T.bind(inside)), "int64") * T.int64(LOAD_BYTES)
            store(self.starts, turn, rows.address + place)
        self.own = self._registers()
        self.widening = widening(rows.row.kind)
        self.masks = self.widening.held_masks()

    def _beyond(self, turn: int) -> bool:
        """Whether some threads have no row of the tile in a turn."""
        return (turn + 1) * self.stride > self.room.rows

    def _registers(self) -> tuple[Buffer, Buffer, Buffer]:
        """Codes, scales, and zero points or minima, of one step."""
        return (
            cuda.registers(WORDS * self.turns, "uint32"),
            cuda.registers(self.turns, "uint32"),
            cuda.registers(self.turns, "uint32"),
        )

    def begin(self, count: int) -> None:
        """Fill the first ``count`` stages, all their codes on the way at once."""
        registers = [self._registers() for _ in range(count)]
        for step, held in enumerate(registers):
            self._fetch(i32(step % self.each), held)
        if count < self.steps:
            self._fetch(i32(count % self.each), self.own)
        for step, held in enumerate(registers):
            self._write(i32(step), held)

    def emit(self, step: Expr, stage: Expr) -> None:
        """Fill a stage with step ``step``, and load the codes of the next one."""
        self._write(stage, self.own)
        following = step + i32(1) if self.steps == self.each else (step + i32(1)) % i32(self.each)
        self._fetch(T.bind(T.min(following, i32(self.each - 1))), self.own)

    def _fetch(self, step: Expr, held: tuple[Buffer, Buffer, Buffer]) -> None:
        row, (codes, scales, zeros) = self.rows.row, held
        column = T.bind(step * i32(self.room.depth) + self.load * i32(row.unit))
        exact = row.layout.padded % self.room.depth == 0
        valid = T.bool(True) if exact else T.bind(column < i32(row.layout.padded))
        for turn in range(self.turns):
            start = T.bind(load(self.starts, turn))
            place = T.bind(row.codes_at(start, column))
            target = cuda.element(codes, WORDS * turn)
            if exact:
                cuda.call("stream_16", target, place)
            else:
                cuda.call("stream_16_if", target, place, valid)
            store(scales, turn, row.scale_bits(start, column, valid))
            if row.kind.zero_points:
                store(zeros, turn, row.zero_bits(start, column, valid))
            elif row.kind.minima:
                store(zeros, turn, row.minimum_bits(start, column, valid))

    def _write(self, stage: Expr, held: tuple[Buffer, Buffer, Buffer]) -> None:
        base = T.bind(stage * i32(self.room.stage_bytes))
        for turn in range(self.turns):
            if self._beyond(turn):
                with when(self.numbers[turn] < i32(self.room.rows)):
                    self._write_row(base, turn, held)
            else:
                self._write_row(base, turn, held)

    def _write_row(self, base: Expr, turn: int, held: tuple[Buffer, Buffer, Buffer]) -> None:
        row, room, (codes, scales, zeros) = self.rows.row, self.room, held
        zero = Zero.at(load(zeros, turn)) if row.kind.zero_points else Zero.of(row.kind)
        scale = T.bind(row.scale(load(scales, turn)) * T.float32(widening(row.kind).factor * LIFT))
        both_scales = value("uint32", "pack_f16", scale, scale) if self._exact else None
        minima = None
        if row.kind.minima:
            minimum = T.bind(row.minimum(load(zeros, turn)) * T.float32(LIFT))
            minima = value("uint32", "pack_f16", minimum, minimum)
        words: dict[int, Expr] = {}
        for word in range(WORDS):
            pairs = self.widening.emit(T.bind(load(codes, WORDS * turn + word)), zero, self.masks)
            for half in range(len(pairs) // 2):
                both = pairs[2 * half : 2 * half + 2]
                quad = word + 4 * half
                for number, halves in enumerate(("low_halves", "high_halves")):
                    pair = value("uint32", halves, *both)
                    words[2 * quad + number] = self._scaled(pair, scale, both_scales, minima)
        pieces = row.unit // PIECE
        for piece in range(pieces):
            place = room.place(self.numbers[turn], T.bind(self.load * i32(pieces) + i32(piece)))
            target = cuda.element(room.memory, T.bind(base + place))
            cuda.call("store_16", target, *(words[WORDS * piece + number] for number in range(WORDS)))

    @property
    def _exact(self) -> bool:
        """Whether scales times their factor are float16."""
        return self.rows.row.kind.scale == TYPE and widening(self.rows.row.kind).factor == 1

    def _scaled(self, pair: Expr, scale: Expr, both_scales: Expr | None, minima: Expr | None) -> Expr:
        if minima is not None:
            return value("uint32", "fma_f16x2", pair, both_scales, minima)
        if both_scales is not None:
            return value("uint32", "mul_f16x2", pair, both_scales)
        low, high = cuda.unpack(TYPE, pair)
        return cuda.pack(TYPE, low * scale, high * scale)
