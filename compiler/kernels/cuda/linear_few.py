"""``y[t, n] = sum_k x[t, k] * w[n, k]`` for at most eight tokens: several weights that share their input in one launch.

What a block multiplies by comes from a *prologue*, a callback that says how to read activations, and what becomes of
a result is up to an *epilogue*: other operations are fused through them. Weights of 16 bits whose columns are a
multiple of 8 go through tensor cores, the activations split into two numbers of 16 bits each. All others take a
slower way, one warp a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.emit import either, load, store, when
from moec.compiler.kernels.cuda.few_stream import Lane, Stream, address_of, multiply, quotient, remainder
from moec.compiler.kernels.cuda.few_tiling import FEW_TOKENS, LANES, TILE_ROWS, Tiling, choose_tiling
from moec.compiler.kernels.cuda.few_tokens import VECTOR, Block, SharedTokens, read_floats
from moec.compiler.kernels.cuda.primitives import (
    blocks_at_once,
    i32,
    launch,
    registers,
    warp_sum,
)
from moec.compiler.kernels.cuda.threads import read

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cpu.emit import Buffer, Expr
    from moec.compiler.kernels.cuda.few_tokens import Prologue, Reader

    Epilogue: TypeAlias = Callable[[int, Expr, Expr, Expr, Expr], None]

SLOW_WARPS = 8
"""Rows that a block takes at once where tensor cores are of no use."""


@dataclass(frozen=True)
class FewGroup:
    """Weights that share their input; each is ``[rows, columns]``, or ``[batch, rows, columns]``."""

    rows: tuple[int, ...]
    columns: int
    dtype: str
    batch: int = 1

    @property
    def on_tensor_cores(self) -> bool:
        """Whether the fast way applies."""
        return self.dtype != "float32" and self.columns % VECTOR == 0


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


def emit_linear_few(
    group: FewGroup,
    weights: list[Buffer],
    tokens: Expr,
    prologue: Prologue,
    epilogue: Epilogue,
    tiling: Tiling | None = None,
    most: int = FEW_TOKENS,
    prologue_bytes: int = 0,
) -> None:
    """Emit the launch that multiplies all weights of ``group``.

    Args:
        group: shapes.
        weights: one flat buffer each, 64-byte aligned.
        tokens: 1 to ``most``, a host value (int64).
        prologue: called once in a kernel, all threads of the block present; what it emits may use shared memory and
            barriers, and calls ``block.wait`` before it reads what others have written. It returns
            ``reader(token, column, count)``, which emits the reading of ``count`` (8, or 1 on the slow way)
            activations; it is called in divergent code.
        epilogue: ``(number in the group, batch, token, row, sum)``, called to emit the storing of a result; int32.
        tiling: instead of the one that ``choose_tiling`` finds.
        most: tokens at most, 8 or fewer.
        prologue_bytes: of shared memory that the prologue uses.
    """
    assert len(weights) == len(group.rows)
    if group.on_tensor_cores:
        tiling = tiling or choose_tiling(sum(group.rows), group.columns, batch=group.batch)
        _emit_fast(group, weights, tokens, prologue, epilogue, tiling, most, prologue_bytes)
    else:
        for number, weight in enumerate(weights):
            _emit_slow(replace(group, rows=(group.rows[number],)), weight, tokens, prologue, epilogue, number)


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


def _emit_fast(
    group: FewGroup,
    weights: list[Buffer],
    tokens: Expr,
    prologue: Prologue,
    epilogue: Epilogue,
    tiling: Tiling,
    most: int,
    prologue_bytes: int,
) -> None:
    ranges, tiles = _ranges(group, tiling)
    blocks = -(-tiles // tiling.tiles)
    with launch((blocks, group.batch), tiling.threads) as ((block, batch), thread):
        blocks_at_once(tiling.blocks)
        lane = Lane.of(thread, tiling)
        count = T.bind(T.cast(tokens, "int32"))
        first = T.bind(block * i32(tiling.tiles))
        left = (
            tiling.tiles
            if tiles % tiling.tiles == 0
            else T.bind(T.min(i32(tiling.tiles), i32(tiles) - first))
        )
        rows = _Rows(group, tiling, ranges, lane, first, batch, [address_of(weight) for weight in weights])
        activations = SharedTokens(
            group.dtype,
            group.columns,
            tiling,
            lane,
            Block(thread, tiling.threads, count, group.columns, batch, block),
            prologue,
            most,
            prologue_bytes,
        )
        stream = Stream(tiling, group.dtype, group.columns, count, left, rows.locate)
        multiply(stream, lane, activations, rows.finish(epilogue))


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
        return T.bind(address + T.cast(row, "int64") * T.int64(2 * self.group.columns))

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


def _emit_slow(
    group: FewGroup, weight: Buffer, tokens: Expr, prologue: Prologue, epilogue: Epilogue, number: int
) -> None:
    (rows,), columns = group.rows, group.columns
    threads = SLOW_WARPS * LANES
    with launch((-(-rows // SLOW_WARPS), group.batch), threads) as ((block, batch), thread):
        count = T.bind(T.cast(tokens, "int32"))
        reader = prologue(Block(thread, threads, count, columns, batch, block))
        row = T.bind(block * i32(SLOW_WARPS) + quotient(thread, LANES))
        lane = T.bind(remainder(thread, LANES))
        with when(row < i32(rows)), T.serial(i32(0), count) as token:
            start = T.bind((T.cast(batch, "int64") * T.int64(rows) + T.cast(row, "int64")) * T.int64(columns))
            total = registers(1)
            store(total, i32(0), T.float32(0))
            with T.serial(i32(0), i32(-(-columns // LANES))) as step:
                column = T.bind(step * i32(LANES) + lane)
                with when(column < i32(columns)):
                    (left,) = reader(token, column, 1)
                    right = read(weight, group.dtype, start + T.cast(column, "int64"))
                    store(total, i32(0), load(total, i32(0)) + left * right)
            value = warp_sum(load(total, i32(0)))
            with when(lane == i32(0)):
                epilogue(number, batch, token, row, value)


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


__all__ = ["Block", "FewGroup", "emit_linear_few", "read_rows", "store_rows"]
