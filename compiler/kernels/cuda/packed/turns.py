"""The products of a round of packed weights: token by token where units have scales of their own, or all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.stream import WORDS
from moec.compiler.kernels.cuda.packed.codes import SPLIT, TYPE, widening
from moec.compiler.kernels.cuda.primitives import element, i32, mma, registers, value, warp_sum
from moec.compiler.kernels.emit import either, load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.packed.loaded import LoadedCodes
    from moec.compiler.kernels.cuda.packed.operands import PackedActivations, PackedSums
    from moec.compiler.kernels.cuda.packed.rows import PackedRow
    from moec.compiler.kernels.cuda.packed.tokens import PackedTokens
    from moec.compiler.kernels.emit import Buffer, Expr

NARROW = 4
"""Tokens whose activations fit twice into the eight columns of a product."""
CHAINS = 2
"""Of products that wait for each other: a product takes about as long as it takes to widen what two of them want."""

ONES = 0x3C003C00
"""Two of float16: products with them are sums of activations, which minima are multiplied by."""


class Turns(Protocol):
    """What happens with the weights of a round when they are there."""

    def emit(self, bank: int, tile: Expr, round_: Expr) -> None:
        """Multiply, and leave the sums where they go."""


class TokenTurns:
    """Token by token: a unit's sums come back to the lanes that have its codes, and its scale (see ``order.py``).

    Args:
        codes: the weights.
        activations: the other operand.
        sums: where sums go.
    """

    def __init__(self, codes: LoadedCodes, activations: PackedActivations, sums: PackedSums) -> None:
        self.codes, self.activations, self.sums = codes, activations, sums
        self.totals = registers(len(codes.lines))

    def emit(self, bank: int, tile: Expr, round_: Expr) -> None:
        """The products of a round."""
        activations, tiling = self.activations, self.codes.tiling
        activations.prepare(tile, round_)
        with T.serial(i32(0), activations.count(tile)) as number:
            activations.arrive()
            for line in range(len(self.codes.lines)):
                store(self.totals, line, T.float32(0))
            for slot in range(tiling.unroll):
                self._products(bank, slot, activations.operands(slot, round_, number))
            activations.leave()
            self._keep(tile, round_, activations.token(tile, number), number)

    def _products(self, bank: int, slot: int, words: list[Expr]) -> None:
        """Add a step's products, each lane those of its own codes."""
        codes, streams = self.codes, self.codes.tiling.streams
        chains = CHAINS // streams
        own = [_zeros(WORDS * chains) for _ in range(streams)]
        codes.hold(bank, slot)
        each = len(words) // WORDS
        for word in range(WORDS):
            for item in range(streams):
                for pair, left in enumerate(codes.left(bank, slot, item, word)):
                    right = words[word * each + 2 * pair : word * each + 2 * pair + 2]
                    mma(TYPE, element(own[item], WORDS * (word % chains)), left, right)
        summed = self._summed(words)
        for line, (item, half) in enumerate(codes.lines):
            both = [_added(own[item], 2 * half + part, chains) for part in range(2)]
            total = load(self.totals, line) + codes.scale(bank, slot, line) * _whole(both)
            if summed is not None:
                total = total + codes.minimum(bank, slot, line) * summed
            store(self.totals, line, total)

    def _summed(self, words: list[Expr]) -> Expr | None:
        """The sum of a step's activations, each lane that of its own, where groups have minima."""
        if not self.codes.row.kind.minima:
            return None
        sums = _zeros(WORDS)
        for pair in range(0, len(words), 2):
            mma(TYPE, element(sums, 0), [T.uint32(ONES)] * 4, words[pair : pair + 2])
        return T.bind(_whole([load(sums, part) for part in range(2)]))

    def _keep(self, tile: Expr, round_: Expr, token: Expr, number: Expr) -> None:
        """Add the sums of a row's four lanes to what the warp has of the token."""
        sums, codes = self.sums, self.codes
        totals = [warp_sum(load(self.totals, line), 4) for line in range(len(codes.lines))]
        with when(codes.lane.part == i32(0)):
            place = sums.place(tile, T.bind(token), number)
            for (item, half), total in zip(codes.lines, totals, strict=True):
                _add_to(sums, sums.at(place, item, half), codes, round_, total)


class SharedTurns:
    """All tokens at once, where the four units of a step share a scale: a column of a product is a token.

    Up to four tokens have both parts of their activations in one product, columns 4 to 7 for the second ones; more have
    a product for each part. A token's sums are the same bits either way.

    Args:
        codes: the weights, ``fits`` of them.
        activations: the other operand.
        sums: where sums go.
    """

    def __init__(self, codes: LoadedCodes, activations: PackedTokens, sums: PackedSums) -> None:
        self.codes, self.activations, self.sums = codes, activations, sums
        self.streams = codes.tiling.streams
        self.totals = [registers(WORDS * self.streams) for _ in range(2)]

    @staticmethod
    def fits(row: PackedRow) -> bool:
        """Whether the units of a step share a scale, and there is nothing else to each."""
        return row.kind.group >= row.step and not row.kind.minima

    def emit(self, bank: int, tile: Expr, round_: Expr) -> None:
        """The products of a round."""
        self.activations.prepare(tile, round_)
        either(
            self.codes.stream.tokens <= i32(NARROW),
            lambda: self._narrow(bank, tile, round_),
            lambda: self._wide(bank, tile, round_),
        )

    def _narrow(self, bank: int, tile: Expr, round_: Expr) -> None:
        """Of at most four tokens."""
        lane = self.codes.lane
        column = T.bind(T.truncmod(lane.group, i32(NARROW)))
        part = T.bind(T.truncdiv(lane.group, i32(NARROW)))
        self._products(bank, round_, [(column, part)])
        first = T.bind(lane.part < i32(2))

        def total(place: int) -> Expr:
            low = value("float32", "shuffle_xor", load(self.totals[0], place), i32(2))
            return T.bind(_whole([load(self.totals[0], place), low]))

        totals = [total(place) for place in range(WORDS * self.streams)]
        with when(first):
            self._keep(tile, round_, totals)

    def _wide(self, bank: int, tile: Expr, round_: Expr) -> None:
        """Of any number of tokens."""
        self._products(bank, round_, [(self.codes.lane.group, i32(part)) for part in range(2)])
        high, low = self.totals
        self._keep(
            tile,
            round_,
            [
                T.bind(_whole([load(part, place) for part in (high, low)]))
                for place in range(WORDS * self.streams)
            ],
        )

    def _products(self, bank: int, round_: Expr, operands: list[tuple[Expr, Expr]]) -> None:
        """Sum up a round's products with one or two operands: a token of this lane's column, and a part."""
        codes = self.codes
        for totals in self.totals[: len(operands)]:
            for place in range(WORDS * self.streams):
                store(totals, place, T.float32(0))
        for slot in range(codes.tiling.unroll):
            words = [self.activations.operands_of_all(slot, round_, *own) for own in operands]
            self._step(bank, slot, words)

    def _step(self, bank: int, slot: int, operands: list[list[Expr]]) -> None:
        codes = self.codes
        own = [[_zeros(WORDS) for _ in operands] for _ in range(self.streams)]
        codes.hold(bank, slot)
        each = len(operands[0]) // WORDS
        for word in range(WORDS):
            for item in range(self.streams):
                for pair, left in enumerate(codes.left(bank, slot, item, word)):
                    first = word * each + 2 * pair
                    for words, sums in zip(operands, own[item], strict=True):
                        mma(TYPE, element(sums, 0), left, words[first : first + 2])
        for line, (item, half) in enumerate(codes.lines):
            scale = T.bind(codes.scale(bank, slot, line))
            for sums, totals in zip(own[item], self.totals, strict=False):
                for column in range(2):
                    place = 2 * half + column
                    total = load(totals, WORDS * item + place) + scale * load(sums, place)
                    store(totals, WORDS * item + place, total)

    def _keep(self, tile: Expr, round_: Expr, totals: list[Expr]) -> None:
        """Add this lane's sums, of two tokens, to what the warp has of them."""
        codes, sums = self.codes, self.sums
        for column in range(2):
            token = T.bind(codes.lane.part * i32(2) + i32(column))
            with when(token < codes.stream.tokens):
                place = sums.place(tile, token, token)
                for item, half in codes.lines:
                    total = totals[WORDS * item + 2 * half + column]
                    _add_to(sums, sums.at(place, item, half), codes, round_, total)


def _add_to(sums: PackedSums, place: Expr, codes: LoadedCodes, round_: Expr, total: Expr) -> None:
    """Store the sum of a round, or of all rounds so far."""
    total = total * T.float32(widening(codes.row.kind).factor / SPLIT.scale)
    if codes.rounds > 1:
        before = T.bind(load(sums.memory, place))
        total = T.Select(round_ == i32(0), T.float32(0), before) + total
    store(sums.memory, place, total)


def _zeros(count: int) -> Buffer:
    buffer = registers(count)
    for place in range(count):
        store(buffer, place, T.float32(0))
    return buffer


def _whole(parts: list[Expr]) -> Expr:
    """A sum of what its two parts of activations gave."""
    return parts[0] + parts[1] * T.float32(1 / SPLIT.lift)


def _added(sums: Buffer, place: int, chains: int) -> Expr:
    """An element of the sums of all chains."""
    total = load(sums, place)
    for chain in range(1, chains):
        total = total + load(sums, place + WORDS * chain)
    return total
