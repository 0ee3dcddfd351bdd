"""The region before products, computed by every one of their blocks, for a step of one token.

Blocks of different products of a launch have one shared memory for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as gpu
from moec.compiler.kernels.cuda.few.tokens import read_floats
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.cuda.rows.block import Place, RowBlock, room_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moec.compiler.kernels.cuda.few.tokens import Block, Prologue, Reader
    from moec.compiler.kernels.emit import Buffer, Expr
    from moec.compiler.kernels.rows.region import Region
    from moec.compiler.kernels.rows.stages import Key

READ_AT_ONCE = 8
"""Elements that a thread reads before it writes the first: the block that keeps rows would else wait for memory each
time, and all others for that block."""


class KeptRegion:
    """Makes prologues of products.

    Args:
        region: as `for_every_block` gives it.
        rows: the global buffer of every tensor that it reads or writes.
        tokens: T, int64.
        source: what the products multiply by, one of its outputs.
    """

    def __init__(self, region: Region, rows: Mapping[Key, Buffer], tokens: Expr, source: Key) -> None:
        self.region, self.rows, self.tokens, self.source = region, rows, tokens, source
        self.memory: dict[Key, Buffer] = {}

    def reserve(self) -> None:
        """Emit the shared memory, where blocks of several products come after it."""
        held = [key for key in self.region.order if key in self.region.shared]
        for key in (*self.region.preloaded, *held):
            self.memory[key] = room_of(self.region.tensors[key])

    def prologue(self, *, writes: bool) -> Prologue:
        """Computes the region; the first block of a product that ``writes`` keeps it for others."""

        def compute(block: Block) -> Reader:
            first = block.number == i32(0) if writes else T.bool(False)
            place = Place(i32(0))
            row = RowBlock(
                self.region,
                self.rows,
                self.tokens,
                place,
                block.thread,
                block.threads,
                writes=first,
                at_once=READ_AT_ONCE,
                memory=self.memory,
            )
            row.preload()
            block.wait()
            row.emit()
            gpu.sync()
            return lambda _, column, count: read_floats(row.shared[self.source], column, count)

        return compute
