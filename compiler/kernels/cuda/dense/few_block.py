"""What a block does for a group of weights and at most eight tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.dense.few_group import FewGroup, GroupRows, tile_ranges
from moec.compiler.kernels.cuda.few.lanes import Lane
from moec.compiler.kernels.cuda.few.multiply import multiply
from moec.compiler.kernels.cuda.few.ring import Ring, ring_elements
from moec.compiler.kernels.cuda.few.stream import Stream, address_of
from moec.compiler.kernels.cuda.few.sums import FewSums, partial_size
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS, Tiling
from moec.compiler.kernels.cuda.few.tokens import (
    AT_ONCE,
    AT_ONCE_OF_EXPERTS,
    STATIC_BYTES,
    Block,
    SharedTokens,
    dynamic_pairs,
    pair_count,
)
from moec.compiler.kernels.cuda.packed.operands import PackedStream
from moec.compiler.kernels.cuda.packed.stream import multiply_packed
from moec.compiler.kernels.cuda.packed.tokens import PackedTokens
from moec.compiler.kernels.cuda.primitives import i32, shared, sync, value
from moec.compiler.kernels.emit import load, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cuda.dense.few_group import Epilogue
    from moec.compiler.kernels.cuda.few.tokens import Prologue
    from moec.compiler.kernels.emit import Buffer, Expr


COUNTER = 0
"""Of blocks that have arrived; attention uses it too, but a kernel counts only when those before it are over."""


@dataclass(frozen=True)
class LastBlock:
    """What is done once results are there, by the last of the blocks that make them: a launch less to wait for."""

    weights: int
    """The first so many of the group have these results."""
    emit: Callable[[Expr, int], None]
    """Given the thread (int32) and how many there are; may use barriers. Results are in memory by then."""


@dataclass(frozen=True)
class FewProduct:
    """All weights of a group times at most eight tokens, by blocks."""

    group: FewGroup
    weights: list[Buffer]
    """One flat buffer each, 64-byte aligned."""
    tokens: Expr
    """1 to ``most``, a host value (int64)."""
    prologue: Prologue
    """Called once in a kernel, all threads of the block present; what it emits may use shared memory and barriers, and
    calls ``block.wait`` before it reads what others have written. It returns ``reader(token, column, count)``, which
    emits the reading of ``count`` (8, or 1 on the slow way) activations; it is called in divergent code."""
    epilogue: Epilogue
    """``(number in the group, batch, token, row, sum)``, called to emit the storing of a result; int32."""
    tiling: Tiling
    most: int = FEW_TOKENS
    prologue_bytes: int = 0
    """Of shared memory that the prologue uses, and ``last``."""
    last: LastBlock | None = None

    @property
    def room(self) -> tuple[Tiling, int, bool]:
        """What `memory_for` is told of it."""
        return self.tiling, self.group.columns, self.tiling.tiles == 1

    @property
    def blocks(self) -> int:
        """How many there are for each matrix of a batch."""
        return -(-tile_ranges(self.group, self.tiling)[1] // self.tiling.tiles)

    def emit(
        self,
        block: Expr,
        batch: Expr,
        thread: Expr,
        memory: FewMemory | None = None,
        *,
        wait_first: bool = False,
        ready: bool = False,
    ) -> None:
        """Emit what one block does.

        Args:
            block: its number, int32.
            batch: which matrix of a batch, int32.
            thread: int32.
            memory: shared memory that the kernel has for it.
            wait_first: see ``Block.wait_first``.
            ready: see ``Block.ready``.
        """
        group, tiling = self.group, self.tiling
        assert memory.does_for(self.room) if memory is not None else not tiling.ring
        ranges, tiles = tile_ranges(group, tiling)
        lane = Lane.of(thread, tiling)
        count = T.bind(T.cast(self.tokens, "int32"))
        first = T.bind(block * i32(tiling.tiles))
        whole = tiles % tiling.tiles == 0
        left = tiling.tiles if whole else T.bind(T.min(i32(tiling.tiles), i32(tiles) - first))
        rows = GroupRows(
            group, tiling, ranges, lane, first, batch, [address_of(weight) for weight in self.weights]
        )
        at_once = AT_ONCE if memory is None else AT_ONCE_OF_EXPERTS
        place = thread, tiling.threads, count, group.columns, batch, block
        own = Block(*place, wait_first=wait_first, at_once=at_once, ready=ready)
        room = self.prologue, self.most, self.prologue_bytes, memory and memory.pairs
        finish, partial = rows.finish(self.epilogue), memory and memory.partial
        sums = FewSums(tiling, lane, count, finish, partial, one_tile=tiling.tiles == 1)
        if group.packed:
            packed = PackedStream(tiling, group.packed, count, left, rows.locate)
            tokens = PackedTokens(group.packed, tiling, lane, own, *room)
            multiply_packed(packed, lane, tokens, sums)
        else:
            activations = SharedTokens(group.dtype, group.columns, tiling, lane, own, *room)
            stream = Stream(tiling, group.dtype, group.columns, count, left, rows.locate)
            ring = None if memory is None else memory.ring_of(tiling)
            multiply(stream, lane, activations, sums, ring)
        if self.last is not None:
            self._emit_last(self.last, block, thread)

    def _emit_last(self, last: LastBlock, block: Expr, thread: Expr) -> None:
        """Every block counts itself; the last one goes on."""
        ranges, tiles = tile_ranges(self.group, self.tiling)
        end = ranges[last.weights].first if last.weights < len(ranges) else tiles
        blocks = -(-end // self.tiling.tiles)
        with when(block < i32(blocks)):
            is_last = shared(1, "int32")
            sync()
            with when(thread == i32(0)):
                store(is_last, 0, T.cast(value("bool", "arrives_last", i32(COUNTER), i32(blocks)), "int32"))
            sync()
            with when(load(is_last, 0) == i32(1)):
                last.emit(thread, self.tiling.threads)


@dataclass(frozen=True)
class FewMemory:
    """Shared memory of a kernel whose blocks do different things."""

    pairs: Buffer
    """uint16, see ``few.tokens.pair_count``."""
    partial: Buffer
    """float32, see ``few.sums.partial_size``."""
    ring: int
    """The element of ``pairs`` that is the first of the weights' ring."""

    def ring_of(self, tiling: Tiling) -> Ring | None:
        """The ring of a kind of block, where it has one."""
        return Ring(self.pairs, self.ring) if tiling.ring else None

    def does_for(self, part: tuple[Tiling, int, bool]) -> bool:
        """Whether blocks can add up in it; see `memory_for`."""
        tiling, _, one_tile = part
        return int(self.partial.shape[0]) >= partial_size(tiling, one_tile=one_tile)


def memory_for(*parts: tuple[Tiling, int, bool], else_bytes: int = 0, most: int = FEW_TOKENS) -> FewMemory:
    """Shared memory that does for each of several kinds of block.

    Args:
        parts: tiling, columns, and whether a block takes a single tile.
        else_bytes: what the kernel has beside it.
        most: tokens at most.
    """
    pairs = max(pair_count(tiling, columns, most) for tiling, columns, _ in parts)
    partial = max(partial_size(tiling, one_tile=one_tile) for tiling, _, one_tile in parts)
    ring = max(ring_elements(tiling) for tiling, _, _ in parts)
    fits = ring == 0 and 2 * pairs + 4 * partial + else_bytes <= STATIC_BYTES
    return FewMemory(shared(pairs, "uint16") if fits else dynamic_pairs(pairs + ring), shared(partial), pairs)
