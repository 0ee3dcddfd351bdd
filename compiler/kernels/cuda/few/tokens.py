"""The activations of at most eight tokens in shared memory, as pairs of 16-bit numbers that tensor cores take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.lanes import Lane, quotient
from moec.compiler.kernels.cuda.few.stream import SPLITS, WORDS
from moec.compiler.kernels.cuda.few.sums import partial_size
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS, STEP_COLUMNS, Tiling
from moec.compiler.kernels.cuda.primitives import (
    call,
    element,
    i32,
    launch_next,
    pack,
    registers,
    shared,
    shared_dynamic,
    sync,
    unpack,
    value,
    wait_previous,
)
from moec.compiler.kernels.emit import either, load, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.emit import Buffer, Expr

    Reader: TypeAlias = Callable[[Expr, Expr, int], list[Expr]]
    Prologue: TypeAlias = Callable[["Block"], Reader]

VECTOR = 8
"""Activations that a thread turns at a time."""
AT_ONCE, AT_ONCE_OF_EXPERTS = 4, 2
"""Vectors that a thread reads before it stores the first; the first launch of experts has no registers for more."""
PAD = 32
"""Columns between tokens that keep the banks of shared memory apart."""
PAIR_BYTES = 4
"""Of an activation in two parts."""
STATIC_BYTES = 47 << 10
"""Shared memory that a block may have without asking, less what a small prologue may want."""

LEAST_DYNAMIC_BYTES = 48 << 10
"""Of memory given at launch: TVM's runtime asks the driver for more than usual only from here on."""


@dataclass(frozen=True)
class Block:
    """What a prologue can count on."""

    thread: Expr
    """int32."""
    threads: int
    tokens: Expr
    """int32, at most 8."""
    columns: int
    batch: Expr
    """Which matrix of a batch this block works for; int32."""
    number: Expr
    """Of the block, among those of its matrix; int32."""

    wait_first: bool = False
    """Whether the next kernel may begin only once this one's wait is over, since it relies on that."""
    at_once: int = AT_ONCE
    """Vectors that a thread reads before it stores the first: fewer where registers are scarce."""
    ready: bool = False
    """Whether all that it reads was there before the kernel began; what runs beside it is not waited for then."""

    def wait(self) -> None:
        """Wait for the kernels before this one: weights are on their way by then."""
        if not self.wait_first:
            launch_next()
        if not self.ready:
            wait_previous()
        if self.wait_first:
            launch_next()


def read_floats(buffer: Buffer, place: Expr, count: int) -> list[Expr]:
    """``count`` float32 from ``place`` on: one, or 8 whose address is a multiple of 16 bytes."""
    if count == 1:
        return [T.bind(load(buffer, place))]
    words = registers(count, "uint32")
    for first in range(0, count, WORDS):
        call("load_16", element(words, first), element(buffer, place + tirx.IntImm(place.ty.dtype, first)))
    return [T.bind(T.reinterpret("float32", load(words, i32(i)))) for i in range(count)]


def store_activation(dtype: str, hi: Expr, lo: Expr, values: list[Expr]) -> None:
    """Split 8 float32 into ``hi`` and ``lo``, which are addresses of 16 bytes each."""
    words = [split_pair(dtype, *values[first : first + 2]) for first in range(0, VECTOR, 2)]
    call("store_16", hi, *(high for high, _ in words))
    call("store_16", lo, *(low for _, low in words))


def split_activation(dtype: str, item: Expr) -> tuple[Expr, Expr]:
    """One float32 as the bits (uint16) of two numbers."""
    high, low = split_pair(dtype, item, item)
    return T.cast(high, "uint16"), T.cast(low, "uint16")


def split_pair(dtype: str, first: Expr, second: Expr) -> tuple[Expr, Expr]:
    """Two float32 as a word of ``hi`` and a word of ``lo``."""
    split = SPLITS[dtype]
    pair = [_clamp(item * T.float32(split.scale), split.largest) for item in (first, second)]
    high = pack(dtype, *pair)
    rest = [
        (item - part) * T.float32(split.lift) for item, part in zip(pair, unpack(dtype, high), strict=True)
    ]
    return high, pack(dtype, *rest)


def _clamp(item: Expr, largest: float | None) -> Expr:
    return item if largest is None else value("float32", "clamp", item, T.float32(largest))


class SharedTokens:
    """Activations of a block in shared memory; segments of rounds where not all columns fit.

    Args:
        dtype: of the weights.
        columns: of the weights.
        tiling: the block's.
        lane: this thread.
        block: what the prologue sees.
        prologue: makes the reader of activations, and waits for them where need be.
        most: tokens at most.
        prologue_bytes: of shared memory that the prologue has for itself.
        pairs: shared memory of ``pair_count`` uint16, where the block has it already.
    """

    def __init__(
        self,
        dtype: str,
        columns: int,
        tiling: Tiling,
        lane: Lane,
        block: Block,
        prologue: Prologue,
        most: int = FEW_TOKENS,
        prologue_bytes: int = 0,
        pairs: Buffer | None = None,
    ) -> None:
        self.dtype, self.columns, self.tiling, self.lane, self.block = dtype, columns, tiling, lane, block
        self.prologue = prologue
        self.rounds = tiling.rounds(columns)
        self.size = _elements(tiling, self.rounds, most)
        self.whole = most * self.rounds * tiling.round_columns <= self.size
        self.lo_start = self.size + most * PAD
        if pairs is None:
            count = 2 * self.lo_start
            fits = PAIR_BYTES * self.lo_start + _sum_bytes(tiling) + prologue_bytes <= STATIC_BYTES
            pairs = shared(count, "uint16") if fits else dynamic_pairs(count)
        self.pairs = pairs

    def ready(self) -> None:
        """Run the prologue; write the activations where all fit."""
        self.reader = self.prologue(self.block)
        tokens, round_columns = self.block.tokens, self.tiling.round_columns
        if self.whole:
            self.segment: Expr = i32(self.rounds)
            self.columns_held: Expr = i32(self.rounds * round_columns)
            self._fill(i32(0), i32(self.rounds))
            sync()
            return
        fitting = T.truncdiv(i32(self.size // round_columns), tokens)
        self.segment = T.bind(T.min(fitting, i32(self.rounds)))
        self.columns_held = T.bind(self.segment * i32(round_columns))

    def prefetch(self, slot: int, tile: Expr, column: Expr, valid: Expr | None) -> None:
        """Nothing: shared memory is near."""

    def prepare(self, tile: Expr, round_: Expr) -> None:
        """Write the next segment where this round begins one."""
        if self.whole:
            return
        begins = T.truncmod(round_, self.segment) == i32(0)
        missing = tirx.any(tile == i32(0), self.segment < i32(self.rounds))
        with when(tirx.all(begins, missing)):
            sync()
            self._fill(round_, T.bind(T.min(self.segment, i32(self.rounds) - round_)))
            sync()

    def operands(self, slot: int, round_: Expr) -> tuple[list[Expr], list[Expr]]:
        """Read a step's activations of this lane's token: zeros where there is none."""
        column = self.lane.column(self.tiling, self.inside(round_)) + i32(STEP_COLUMNS * slot)
        place = T.bind(self.lane.group * self._stride + column)
        present = self.lane.group < self.block.tokens
        both = []
        for start in (0, self.lo_start):
            words = registers(WORDS, "uint32")
            call("load_16_if", element(words, 0), element(self.pairs, place + i32(start)), present)
            both.append([load(words, i32(i)) for i in range(WORDS)])
        return both[0], both[1]

    def inside(self, round_: Expr) -> Expr:
        """A round's number in its segment."""
        return round_ if self.whole else T.truncmod(round_, self.segment)

    @property
    def _stride(self) -> Expr:
        return self.columns_held + i32(PAD)

    def _write(self, token: Expr, local: Expr, values: list[Expr]) -> None:
        """Write 8 activations of a token, from a column of the segment on."""
        place = T.bind(token * self._stride + local)
        low = place + i32(self.lo_start)
        store_activation(self.dtype, element(self.pairs, place), element(self.pairs, low), values)

    def _fill(self, first_round: Expr, rounds: Expr) -> None:
        """Write the activations of some rounds, for all tokens."""
        vectors = T.bind(rounds * i32(self.tiling.round_columns // VECTOR))
        count = T.bind(vectors * self.block.tokens)
        first = T.bind(first_round * i32(self.tiling.round_columns))

        def once() -> None:
            with when(self.block.thread < count):
                self._convert([self.block.thread], vectors, count, first)

        def often() -> None:
            step = self.block.at_once * self.block.threads
            turns = T.bind(quotient(count + i32(step - 1), step))
            with T.serial(i32(0), turns) as turn:
                start = T.bind(turn * i32(step) + self.block.thread)
                numbers = [T.bind(start + i32(i * self.block.threads)) for i in range(self.block.at_once)]
                self._convert(numbers, vectors, count, first)

        either(count <= i32(self.block.threads), once, often)

    def _convert(self, numbers: list[Expr], vectors: Expr, count: Expr, first: Expr) -> None:
        """Read all the numbered vectors, then write them: what lies beyond the last is read as the last."""
        read = []
        for number in numbers:
            inside = T.bind(T.min(number, count - i32(1))) if len(numbers) > 1 else number
            token, vector = T.bind(T.truncdiv(inside, vectors)), T.bind(T.truncmod(inside, vectors))
            local = T.bind(vector * i32(VECTOR))
            column = T.bind(T.min(first + local, i32(self.columns - VECTOR)))
            values = self.reader(token, column, VECTOR)
            if self.rounds * self.tiling.round_columns != self.columns:
                beyond = T.bind(first + local >= i32(self.columns))
                values = [T.bind(T.Select(beyond, T.float32(0), item)) for item in values]
            read.append((token, local, values))
        for number, item in zip(numbers, read, strict=True):
            with when(number < count):
                self._write(*item)


def pair_count(tiling: Tiling, columns: int, most: int = FEW_TOKENS) -> int:
    """uint16 of shared memory that the activations of so many tokens take."""
    return 2 * (_elements(tiling, tiling.rounds(columns), most) + most * PAD)


def dynamic_pairs(count: int) -> Buffer:
    """Memory for activations that is given at launch."""
    return shared_dynamic(max(count, LEAST_DYNAMIC_BYTES // 2), "uint16")


def _elements(tiling: Tiling, rounds: int, most: int) -> int:
    """Activations to hold at once: all, or as many as may be, and no less than a round of ``most`` tokens."""
    one_round = most * tiling.round_columns
    return max(one_round, min(one_round * rounds, tiling.shared_bytes // PAIR_BYTES))


def _sum_bytes(tiling: Tiling) -> int:
    return 4 * partial_size(tiling, one_tile=tiling.tiles == 1)
