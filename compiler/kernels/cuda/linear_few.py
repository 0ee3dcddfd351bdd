"""``y[t, n] = sum_k x[t, k] * w[n, k]`` for at most eight tokens: several weights that share their input in one launch.

What a block multiplies by comes from a *prologue*, a callback that says how to read activations, and what becomes of
a result is up to an *epilogue*: other operations are fused through them. Weights of 16 bits and quantized ones whose
columns are a multiple of 8 go through tensor cores, the activations split into two numbers of 16 bits each. All others
take a slower way, one warp a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few_lanes import Lane, quotient, remainder
from moec.compiler.kernels.cuda.few_stream import Stream, address_of, multiply
from moec.compiler.kernels.cuda.few_sums import FewSums, partial_size
from moec.compiler.kernels.cuda.few_tiling import FEW_TOKENS, LANES, TILE_ROWS, Tiling, choose_tiling
from moec.compiler.kernels.cuda.few_tokens import (
    AT_ONCE,
    AT_ONCE_OF_EXPERTS,
    STATIC_BYTES,
    VECTOR,
    Block,
    SharedTokens,
    dynamic_pairs,
    pair_count,
    read_floats,
)
from moec.compiler.kernels.cuda.packed.element import read_element
from moec.compiler.kernels.cuda.packed.rows import PackedRow
from moec.compiler.kernels.cuda.packed.stream import PackedStream, multiply_packed
from moec.compiler.kernels.cuda.packed.tiling import packed_tiling
from moec.compiler.kernels.cuda.packed.tokens import PackedTokens
from moec.compiler.kernels.cuda.primitives import (
    blocks_at_once,
    i32,
    launch,
    registers,
    shared,
    warp_sum,
)
from moec.compiler.kernels.emit import either, load, store, when
from moec.formats import format_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cuda.few_tokens import Prologue, Reader
    from moec.compiler.kernels.emit import Buffer, Expr

    Epilogue: TypeAlias = Callable[[int, Expr, Expr, Expr, Expr], None]

SLOW_WARPS = 8
"""Rows that a block takes at once where tensor cores are of no use."""


@dataclass(frozen=True)
class FewGroup:
    """Weights that share their input; each is ``[rows, columns]``, or ``[batch, rows, columns]``."""

    rows: tuple[int, ...]
    columns: int
    dtype: str
    """A type, or the name of a format of quantized weights."""
    batch: int = 1

    @property
    def on_tensor_cores(self) -> bool:
        """Whether the fast way applies."""
        return self.dtype != "float32" and self.columns % VECTOR == 0

    @property
    def packed(self) -> PackedRow | None:
        """Their rows where they are quantized."""
        kind = format_of(self.dtype)
        return None if kind is None else PackedRow(kind, self.columns)

    @property
    def row_bytes(self) -> int:
        """From one row to the next, where they are not float32."""
        return self.packed.layout.row_bytes if self.packed else 2 * self.columns

    def tiling(self) -> Tiling:
        """How a launch of its own is cut."""
        if self.packed:
            return packed_tiling(self.packed, sum(self.rows), batch=self.batch)
        return choose_tiling(sum(self.rows), self.columns, batch=self.batch)


def read_rows(x: Buffer, place: Callable[[Expr, Expr], Expr]) -> Prologue:
    """The prologue that takes activations as they are.

    Args:
        x: float32.
        place: where a token's first activation lies, in elements (int64), given the token and the number in a
            batch, int32; a multiple of 4.
    """

    def prologue(block: Block) -> Reader:
        block.wait()

        def read_at(token: Expr, column: Expr, count: int) -> list[Expr]:
            start = place(token, block.batch)
            return read_floats(x, T.bind(start + T.cast(column, "int64")), count)

        return read_at

    return prologue


def emit_linear_few(product: FewProduct) -> None:
    """Emit the launch that multiplies all weights of a group."""
    group = product.group
    if group.on_tensor_cores:
        with launch((product.blocks, group.batch), product.tiling.threads) as ((block, batch), thread):
            blocks_at_once(product.tiling.blocks)
            product.emit(block, batch, thread)
        return
    for number in range(len(product.weights)):
        _emit_slow(product, number)


@dataclass(frozen=True)
class _Range:
    """The tiles of one weight among those of the group."""

    number: int
    first: int
    rows: int


def _ranges(group: FewGroup, tiling: Tiling) -> tuple[list[_Range], int]:
    ranges, tiles = [], 0
    for number, rows in enumerate(group.rows):
        ranges.append(_Range(number, tiles, rows))
        tiles += -(-rows // tiling.rows)
    return ranges, tiles


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
    """Of shared memory that the prologue uses."""

    @property
    def blocks(self) -> int:
        """How many there are for each matrix of a batch."""
        return -(-_ranges(self.group, self.tiling)[1] // self.tiling.tiles)

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
        ranges, tiles = _ranges(group, tiling)
        lane = Lane.of(thread, tiling)
        count = T.bind(T.cast(self.tokens, "int32"))
        first = T.bind(block * i32(tiling.tiles))
        whole = tiles % tiling.tiles == 0
        left = tiling.tiles if whole else T.bind(T.min(i32(tiling.tiles), i32(tiles) - first))
        rows = _Rows(
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
            return
        activations = SharedTokens(group.dtype, group.columns, tiling, lane, own, *room)
        stream = Stream(tiling, group.dtype, group.columns, count, left, rows.locate)
        multiply(stream, lane, activations, sums)


@dataclass(frozen=True)
class FewMemory:
    """Shared memory of a kernel whose blocks do different things."""

    pairs: Buffer
    """uint16, see ``few_tokens.pair_count``."""
    partial: Buffer
    """float32, see ``few_stream.partial_size``."""


def memory_for(*parts: tuple[Tiling, int, bool], else_bytes: int = 0) -> FewMemory:
    """Shared memory that does for each of several kinds of block.

    Args:
        parts: tiling, columns, and whether a block takes a single tile.
        else_bytes: what the kernel has beside it.
    """
    pairs = max(pair_count(tiling, columns) for tiling, columns, _ in parts)
    partial = max(partial_size(tiling, one_tile=one_tile) for tiling, _, one_tile in parts)
    fits = 2 * pairs + 4 * partial + else_bytes <= STATIC_BYTES
    return FewMemory(shared(pairs, "uint16") if fits else dynamic_pairs(pairs), shared(partial))


@dataclass(frozen=True)
class _Rows:
    """From tiles of a block to rows of weights."""

    group: FewGroup
    tiling: Tiling
    ranges: list[_Range]
    lane: Lane
    first: Expr
    batch: Expr
    addresses: list[Expr]

    def locate(self, tile: Expr, stream: int, half: int) -> Expr:
        """The address of this lane's row; beyond the last row, of the last."""
        tile = T.bind(self.first + tile)
        address, first, rows = self.addresses[0], i32(0), i32(self.ranges[0].rows)
        for item in self.ranges[1:]:
            there = T.bind(tile >= i32(item.first))
            address = T.bind(T.Select(there, self.addresses[item.number], address))
            first = T.bind(T.Select(there, i32(item.first), first))
            rows = T.bind(T.Select(there, i32(item.rows), rows))
        local = (self.lane.row_warp * i32(self.tiling.streams) + i32(stream)) * i32(TILE_ROWS)
        row = (tile - first) * i32(self.tiling.rows) + local + self.lane.group + i32(8 * half)
        row = T.bind(T.min(row, rows - i32(1)))
        if self.group.batch > 1:
            row = T.bind(self.batch * rows + row)
        return T.bind(address + T.cast(row, "int64") * T.int64(self.group.row_bytes))

    def finish(self, epilogue: Epilogue) -> Callable[[Expr, Expr, Expr, list[Expr]], None]:
        """What ``multiply`` does with sums."""

        def stored(tile: Expr, row: Expr, token: Expr, sums: list[Expr]) -> None:
            tile = T.bind(self.first + tile)
            for number, total in enumerate(sums):
                warp = quotient(row, TILE_ROWS) * i32(self.tiling.streams) + i32(number)
                local = T.bind(warp * i32(TILE_ROWS) + remainder(row, TILE_ROWS))
                self._dispatch(self.ranges, tile, local, token, total, epilogue)

        return stored

    def _dispatch(
        self, ranges: list[_Range], tile: Expr, local: Expr, token: Expr, total: Expr, epilogue: Epilogue
    ) -> None:
        item, *others = ranges

        def own() -> None:
            row = T.bind((tile - i32(item.first)) * i32(self.tiling.rows) + local)
            with when(row < i32(item.rows)):
                epilogue(item.number, self.batch, token, row, total)

        if others:
            rest = lambda: self._dispatch(others, tile, local, token, total, epilogue)  # noqa: E731
            either(tile < i32(others[0].first), own, rest)
        else:
            own()


def _emit_slow(product: FewProduct, number: int) -> None:
    group, weight = product.group, product.weights[number]
    rows, columns = group.rows[number], group.columns
    threads = SLOW_WARPS * LANES
    with launch((-(-rows // SLOW_WARPS), group.batch), threads) as ((block, batch), thread):
        count = T.bind(T.cast(product.tokens, "int32"))
        reader = product.prologue(Block(thread, threads, count, columns, batch, block))
        row = T.bind(block * i32(SLOW_WARPS) + quotient(thread, LANES))
        lane = T.bind(remainder(thread, LANES))
        with when(row < i32(rows)), T.serial(i32(0), count) as token:
            line = T.bind(T.cast(batch, "int64") * T.int64(rows) + T.cast(row, "int64"))
            total = registers(1)
            store(total, i32(0), T.float32(0))
            with T.serial(i32(0), i32(-(-columns // LANES))) as step:
                column = T.bind(step * i32(LANES) + lane)
                with when(column < i32(columns)):
                    (left,) = reader(token, column, 1)
                    right = read_element(weight, group.dtype, columns, line, column)
                    store(total, i32(0), load(total, i32(0)) + left * right)
            value = warp_sum(load(total, i32(0)))
            with when(lane == i32(0)):
                product.epilogue(number, batch, token, row, value)


def store_rows(
    outputs: list[Buffer],
    biases: list[Buffer | None],
    rows: tuple[int, ...],
    place: Callable[[int, Expr, Expr, Expr], Expr],
) -> Epilogue:
    """The epilogue that adds a bias where there is one and stores float32.

    Args:
        outputs: one for each weight of a group.
        biases: float32 ``[batch, rows]``, or ``None``.
        rows: of each weight.
        place: ``(number in the group, batch, token, row)`` to the element (int64) of that output.
    """

    def epilogue(number: int, batch: Expr, token: Expr, row: Expr, total: Expr) -> None:
        bias = biases[number]
        if bias is not None:
            total = total + load(bias, T.cast(batch * i32(rows[number]) + row, "int64"))
        store(outputs[number], place(number, batch, token, row), total)

    return epilogue


__all__ = ["Block", "FewGroup", "FewMemory", "FewProduct", "emit_linear_few", "read_rows", "store_rows"]
