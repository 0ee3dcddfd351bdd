"""Packed weights streamed through registers into tensor cores, for at most eight tokens.

As ``few.stream``: weights are the left operand of ``mma.m16n8k16``, activations the right one. A lane loads 16 bytes of
codes of rows g and g + 8 at a time, whole rounds of them ahead of their use. Codes become float16, exactly; the sums of
what shares a scale are kept apart (``order.py`` says how), and meet it in float32. So results are those of the weights
that the bytes stand for, but for the order of sums, which does not depend on T.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.packed.loaded import LoadedCodes
from moec.compiler.kernels.cuda.packed.tokens import PackedTokens
from moec.compiler.kernels.cuda.packed.turns import SharedTurns, TokenTurns
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.few.lanes import Lane
    from moec.compiler.kernels.cuda.packed.operands import PackedActivations, PackedStream, PackedSums
    from moec.compiler.kernels.cuda.packed.turns import Turns
    from moec.compiler.kernels.emit import Expr


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
        self.stream, self.activations, self.sums, self.tiling = stream, activations, sums, stream.tiling
        shared = isinstance(activations, PackedTokens) and SharedTurns.fits(stream.row)
        self.codes = LoadedCodes(stream, lane, shared=shared)
        self.rounds = self.codes.rounds
        self.single = self.rounds == 1 and isinstance(stream.tiles, int) and stream.tiles == 1
        self.turns: Turns
        if isinstance(activations, PackedTokens) and shared:
            self.turns = SharedTurns(self.codes, activations, sums)
        else:
            self.turns = TokenTurns(self.codes, activations, sums)

    def run(self) -> None:
        tiles, banks = self.stream.tiles, self.tiling.banks
        total = tiles * i32(self.rounds) if not isinstance(tiles, int) else i32(tiles * self.rounds)
        total = T.bind(total)
        for bank in range(banks):
            with nullcontext() if bank == 0 else when(i32(bank) < total):
                self.codes.load(bank, *self._tile(i32(bank)))
        self.activations.ready()
        if self.single:
            self.turns.emit(0, i32(0), i32(0))
            self.sums.done(i32(0))
            return
        with T.serial(i32(0), T.bind(T.truncdiv(total + i32(banks - 1), i32(banks)))) as turn:
            for bank in range(banks):
                number = T.bind(turn * i32(banks) + i32(bank))
                with nullcontext() if banks == 1 else when(number < total):
                    tile, round_ = self._tile(number)
                    self.turns.emit(bank, tile, round_)
                    later = T.bind(number + i32(banks))
                    with when(later < total):
                        self.codes.load(bank, *self._tile(later))
                    with nullcontext() if self.rounds == 1 else when(round_ == i32(self.rounds - 1)):
                        self.sums.done(tile)

    def _tile(self, number: Expr) -> tuple[Expr, Expr]:
        if self.rounds == 1:
            return number, i32(0)
        rounds = i32(self.rounds)
        return T.bind(T.truncdiv(number, rounds)), T.bind(T.truncmod(number, rounds))
