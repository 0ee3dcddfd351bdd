"""Packed weights streamed through registers into tensor cores, for at most eight tokens.

As ``few_stream``: weights are the left operand of ``mma.m16n8k16``, activations the right one. A lane loads 16 bytes of
codes of rows g and g + 8 at a time, whole rounds of them ahead of their use. Codes become float16, exactly; the sums of
what shares a scale are kept apart (``order.py`` says how), and meet it in float32. So results are those of the weights
that the bytes stand for, but for the order of sums, which does not depend on T.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.emit import load, store, when
from moec.compiler.kernels.cuda.few_stream import SPLITS, WORDS
from moec.compiler.kernels.cuda.few_sums import FewSums
from moec.compiler.kernels.cuda.packed.codes import Zero, widening
from moec.compiler.kernels.cuda.primitives import call, element, i32, mma, registers, warp_sum

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cpu.emit import Buffer, Expr
    from moec.compiler.kernels.cuda.few_lanes import Lane
    from moec.compiler.kernels.cuda.few_sums import Finish
    from moec.compiler.kernels.cuda.few_tiling import Tiling
    from moec.compiler.kernels.cuda.packed.rows import PackedRow

CHAINS = 2
"""Of products that wait for each other: a product takes about as long as it takes to widen what two of them want."""
TYPE = "float16"
"""Of the operands."""
SPLIT = SPLITS[TYPE]
ONES = 0x3C003C00
"""Two of float16: products with them are sums of activations, which minima are multiplied by."""


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

    def at(self, place: Expr, stream: int, half: int) -> Expr:
        """The element of a stream and of the row, or of that eight further down."""

    def done(self, tile: Expr) -> None:
        """Emit what follows the last product of a tile, in all threads of a block."""


class TileSums(FewSums):
    """The sums of a tile of rows, finished tile by tile."""

    def __init__(
        self, stream: PackedStream, lane: Lane, finish: Finish, memory: Buffer | None = None
    ) -> None:
        one_tile = isinstance(stream.tiles, int) and stream.tiles == 1
        super().__init__(stream.tiling, lane, memory, one_tile=one_tile)
        self.tokens, self.end = stream.tokens, finish

    def place(self, tile: Expr, token: Expr, _number: Expr | None = None, /) -> Expr:
        """By token."""
        return super().place(tile, token)

    def done(self, tile: Expr) -> None:
        """Add up, and finish."""
        self.finish(tile, self.tokens, self.end)


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


def multiply_packed(
    stream: PackedStream,
    lane: Lane,
    activations: PackedActivations,
    sums: PackedSums,
) -> None:
    """Emit all products of a block."""
    _Emitter(stream, lane, activations, sums).run()


class _Emitter:
    """The parts of ``multiply_packed``, and the registers that they share."""

    def __init__(
        self, stream: PackedStream, lane: Lane, activations: PackedActivations, sums: PackedSums
    ) -> None:
        tiling, row = stream.tiling, stream.row
        self.stream, self.lane, self.activations, self.tiling, self.row = (
            stream,
            lane,
            activations,
            tiling,
            row,
        )
        assert tiling.step == row.step
        self.rounds = tiling.rounds(row.columns)
        self.exact = self.rounds * tiling.round_columns == row.layout.padded
        self.single = self.rounds == 1 and isinstance(stream.tiles, int) and stream.tiles == 1
        self.lines = [(item, half) for item in range(tiling.streams) for half in range(2)]
        shared_by = max(1, row.kind.group // row.step)
        self.shared_by = shared_by if tiling.unroll % shared_by == 0 else 1
        steps = tiling.banks * tiling.unroll * len(self.lines)
        self.codes = registers(WORDS * steps, "uint32")
        self.scales = registers(steps // self.shared_by, "uint32")
        self.zeros = registers(steps // self.shared_by, "uint32") if row.kind.offset_bytes else None
        """Zero points, or minima."""
        self.totals = registers(len(self.lines))
        self.sums = sums

    def run(self) -> None:
        tiles, banks = self.stream.tiles, self.tiling.banks
        total = tiles * i32(self.rounds) if not isinstance(tiles, int) else i32(tiles * self.rounds)
        total = T.bind(total)
        for bank in range(banks):
            with nullcontext() if bank == 0 else when(i32(bank) < total):
                self._load(bank, i32(bank))
        self.activations.ready()
        if self.single:
            self._turn(0, i32(0), i32(0))
            self.sums.done(i32(0))
            return
        with T.serial(i32(0), T.bind(T.truncdiv(total + i32(banks - 1), i32(banks)))) as turn:
            for bank in range(banks):
                number = T.bind(turn * i32(banks) + i32(bank))
                with nullcontext() if banks == 1 else when(number < total):
                    tile, round_ = self._tile(number)
                    self._turn(bank, tile, round_)
                    later = T.bind(number + i32(banks))
                    with when(later < total):
                        self._load(bank, later)
                    with nullcontext() if self.rounds == 1 else when(round_ == i32(self.rounds - 1)):
                        self.sums.done(tile)

    def _tile(self, number: Expr) -> tuple[Expr, Expr]:
        if self.rounds == 1:
            return number, i32(0)
        rounds = i32(self.rounds)
        return T.bind(T.truncdiv(number, rounds)), T.bind(T.truncmod(number, rounds))

    def _line(self, bank: int, slot: int, line: int) -> int:
        """The number of a step's row of this lane."""
        return (bank * self.tiling.unroll + slot) * len(self.lines) + line

    def _scale(self, bank: int, slot: int, line: int) -> int:
        """The number of its scale: steps that follow each other may share one."""
        steps = self.tiling.unroll // self.shared_by
        return (bank * steps + slot // self.shared_by) * len(self.lines) + line

    def _load(self, bank: int, number: Expr) -> None:
        """Load a round of codes, and the scales of their groups."""
        row, tile_round = self.row, self._tile(number)
        tile, round_ = tile_round
        if self.stream.begin is not None:
            with nullcontext() if self.rounds == 1 else when(round_ == i32(0)):
                self.stream.begin(tile)
        first = self.lane.column(self.tiling, round_)
        starts = [T.bind(self.stream.locate(tile, item, half)) for item, half in self.lines]
        codes = [T.bind(row.codes_at(start, first)) for start in starts]
        for slot in range(self.tiling.unroll):
            column = T.bind(first + i32(row.step * slot))
            valid = tirx.IntImm("bool", 1) if self.exact else T.bind(column < i32(row.layout.padded))
            for line, (start, code) in enumerate(zip(starts, codes, strict=True)):
                target = element(self.codes, WORDS * self._line(bank, slot, line))
                place = code + T.int64(row.step * row.kind.bits // 8 * slot)
                if self.exact:
                    call("stream_16", target, place)
                else:
                    call("stream_16_if", target, place, valid)
                if slot % self.shared_by == 0:
                    own = self._scale(bank, slot, line)
                    store(self.scales, own, row.scale_bits(start, column, valid))
                    if row.kind.zero_points:
                        store(self.zeros, own, row.zero_bits(start, column, valid))
                    elif row.kind.minima:
                        store(self.zeros, own, row.minimum_bits(start, column, valid))

    def _turn(self, bank: int, tile: Expr, round_: Expr) -> None:
        """The products of a round, token by token."""
        activations = self.activations
        activations.prepare(tile, round_)
        with T.serial(i32(0), activations.count(tile)) as number:
            activations.arrive()
            for line in range(len(self.lines)):
                store(self.totals, line, T.float32(0))
            for slot in range(self.tiling.unroll):
                self._products(bank, slot, activations.operands(slot, round_, number))
            activations.leave()
            self._keep(tile, round_, activations.token(tile, number), number)

    def _products(self, bank: int, slot: int, words: list[Expr]) -> None:
        """Add a step's products, each lane those of its own codes."""
        streams, widen = self.tiling.streams, widening(self.row.kind).emit
        chains = CHAINS // streams
        own = [registers(WORDS * chains) for _ in range(streams)]
        zeros = [self._zero(bank, slot, line) for line in range(len(self.lines))]
        for line in range(len(self.lines)):
            # The codes are widened again for each token: held wide they would take all registers.
            call("hold_words", element(self.codes, WORDS * self._line(bank, slot, line)))
        for item in own:
            for place in range(WORDS * chains):
                store(item, place, T.float32(0))
        each = len(words) // WORDS
        for word in range(WORDS):
            for item in range(streams):
                lines = (2 * item, 2 * item + 1)
                places = [WORDS * self._line(bank, slot, line) + word for line in lines]
                low, high = (
                    widen(T.bind(load(self.codes, place)), zeros[line])
                    for place, line in zip(places, lines, strict=True)
                )
                for pair in range(0, each, 2):
                    left = [low[pair], high[pair], low[pair + 1], high[pair + 1]]
                    right = words[word * each + pair : word * each + pair + 2]
                    mma(TYPE, element(own[item], WORDS * (word % chains)), left, right)
        summed = self._summed(words)
        for line, (item, half) in enumerate(self.lines):
            scale = self.row.scale(load(self.scales, self._scale(bank, slot, line)))
            both = [_added(own[item], 2 * half + part, chains) for part in range(2)]
            total = load(self.totals, line) + scale * _whole(both)
            if summed is not None:
                total = total + self.row.minimum(load(self.zeros, self._scale(bank, slot, line))) * summed
            store(self.totals, line, total)

    def _summed(self, words: list[Expr]) -> Expr | None:
        """The sum of a step's activations, each lane that of its own, where groups have minima."""
        if not self.row.kind.minima:
            return None
        sums = registers(WORDS)
        for place in range(WORDS):
            store(sums, place, T.float32(0))
        for pair in range(0, len(words), 2):
            mma(TYPE, element(sums, 0), [T.uint32(ONES)] * 4, words[pair : pair + 2])
        return T.bind(_whole([load(sums, part) for part in range(2)]))

    def _zero(self, bank: int, slot: int, line: int) -> Zero:
        if not self.row.kind.zero_points:
            return Zero.of(self.row.kind)
        return Zero.at(load(self.zeros, self._scale(bank, slot, line)))

    def _keep(self, tile: Expr, round_: Expr, token: Expr, number: Expr) -> None:
        """Add the sums of a row's four lanes to what the warp has of the token."""
        factor = widening(self.row.kind).factor / SPLIT.scale
        sums = self.sums
        totals = [warp_sum(load(self.totals, line), 4) for line in range(len(self.lines))]
        with when(self.lane.part == i32(0)):
            place = sums.place(tile, T.bind(token), number)
            for (item, half), total in zip(self.lines, totals, strict=True):
                total = total * T.float32(factor)  # noqa: PLW2901
                if self.rounds > 1:
                    before = T.bind(load(sums.memory, sums.at(place, item, half)))
                    total = T.Select(round_ == i32(0), T.float32(0), before) + total  # noqa: PLW2901
                store(sums.memory, sums.at(place, item, half), total)


def _whole(parts: list[Expr]) -> Expr:
    """A sum of what its two parts of activations gave."""
    return parts[0] + parts[1] * T.float32(1 / SPLIT.lift)


def _added(sums: Buffer, place: int, chains: int) -> Expr:
    """An element of the sums of all chains."""
    total = load(sums, place)
    for chain in range(1, chains):
        total = total + load(sums, place + WORDS * chain)
    return total
