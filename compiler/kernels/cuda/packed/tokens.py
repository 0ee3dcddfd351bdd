"""The activations of at most eight tokens in shared memory, in the order that packed weights want."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.stream import WORDS
from moec.compiler.kernels.cuda.few.tokens import SharedTokens, split_pair
from moec.compiler.kernels.cuda.packed.codes import TYPE
from moec.compiler.kernels.cuda.packed.order import LINE, PIECE, OperandOrder
from moec.compiler.kernels.cuda.primitives import call, element, i32, registers
from moec.compiler.kernels.emit import load

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.few.lanes import Lane
    from moec.compiler.kernels.cuda.few.tiling import Tiling
    from moec.compiler.kernels.cuda.few.tokens import Block, Prologue
    from moec.compiler.kernels.cuda.packed.rows import PackedRow
    from moec.compiler.kernels.emit import Buffer, Expr


def brings(lane: Lane) -> Expr:
    """Whether this lane's column of the activations is one of its own unit's."""
    return lane.part == T.truncdiv(lane.group, i32(2))


class PackedTokens(SharedTokens):
    """``SharedTokens`` for ``multiply_packed``: arguments as there."""

    def __init__(
        self,
        row: PackedRow,
        tiling: Tiling,
        lane: Lane,
        block: Block,
        prologue: Prologue,
        most: int,
        prologue_bytes: int = 0,
        pairs: Buffer | None = None,
    ) -> None:
        super().__init__(TYPE, row.columns, tiling, lane, block, prologue, most, prologue_bytes, pairs)
        self.order = OperandOrder.of(row.kind)

    def count(self, _tile: Expr, /) -> Expr:
        """All tokens of the block."""
        return self.block.tokens

    def token(self, _tile: Expr, number: Expr, /) -> Expr:
        """In their order."""
        return number

    def arrive(self) -> None:
        """Nothing: shared memory is near."""

    leave = arrive

    def operands(self, slot: int, round_: Expr, number: Expr, /) -> list[Expr]:  # type: ignore[override]
        """Read a step's activations of a token: zeros where this lane's column is of another unit."""
        place = T.bind(self._place(number, slot, round_) + self.lane.group * i32(PIECE))
        return read_operands(self.pairs, place, brings(self.lane), self.order)

    def operands_of_all(self, slot: int, round_: Expr, token: Expr, part: Expr) -> list[Expr]:
        """Read one part of a token's activations of a step, those of this lane's unit: zeros beyond the last token."""
        own = (self.lane.part * i32(2) + part) * i32(PIECE)
        place = T.bind(self._place(token, slot, round_) + own)
        return read_operands(self.pairs, place, token < self.block.tokens, self.order)

    def _place(self, token: Expr, slot: int, round_: Expr) -> Expr:
        """Where a step of a token begins."""
        tiling, order = self.tiling, self.order
        inside = self.inside(round_)
        step = (inside * i32(tiling.column_warps) + self.lane.column_warp) * i32(tiling.unroll) + i32(slot)
        return token * self._stride + step * i32(order.loads * LINE)

    @property
    def _stride(self) -> Expr:
        """Between tokens: a piece more than they have, which keeps the banks of shared memory apart."""
        return i32(2) * self.columns_held + i32(PIECE)

    def _write(self, token: Expr, local: Expr, values: list[Expr]) -> None:
        start = T.bind(token * self._stride)
        words = []
        for first in range(0, len(values), 4):
            a, b, c, d = values[first : first + 4]
            even, odd = split_pair(TYPE, a, c), split_pair(TYPE, b, d)
            words.append([(even[part], odd[part]) for part in range(2)])
        for part in range(2):
            if self.order.bits == 8:  # neighbours: one piece
                place = T.bind(start + self.order.quad(local, part))
                call("store_16", element(self.pairs, place), *words[0][part], *words[1][part])
                continue
            for quad, word in enumerate(words):
                place = T.bind(start + self.order.quad(local + i32(4 * quad), part))
                call("store_8", element(self.pairs, place), *word[part])


def read_operands(memory: Buffer, place: Expr, present: Expr, order: OperandOrder) -> list[Expr]:
    """This lane's words of a step, which begins at ``place`` with this lane's piece; zeros where not present."""
    words = registers(WORDS * order.loads, "uint32")
    present = T.bind(present)
    for line in range(order.loads):
        source = element(memory, place + i32(line * LINE))
        call("load_16_if", element(words, WORDS * line), source, present)
    return [T.bind(load(words, i32(word))) for word in range(WORDS * order.loads)]
