"""Weights that share their input in a launch of few tokens, and where each of their rows is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.lanes import Lane, quotient, remainder
from moec.compiler.kernels.cuda.few.tiling import TILE_ROWS, Tiling, choose_tiling
from moec.compiler.kernels.cuda.packed.rows import PackedRow
from moec.compiler.kernels.cuda.packed.tiling import packed_tiling
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import either, when
from moec.compiler.kernels.linear_shape import is_fast
from moec.formats import format_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.emit import Expr

    Epilogue: TypeAlias = Callable[[int, Expr, Expr, Expr, Expr], None]


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
        return is_fast(self.dtype, self.columns)

    @property
    def packed(self) -> PackedRow | None:
        """Their rows where they are quantized."""
        kind = format_of(self.dtype)
        return None if kind is None else PackedRow(kind, self.columns)

    @property
    def row_bytes(self) -> int:
        """From one row to the next, where they are not float32."""
        return self.packed.layout.row_bytes if self.packed else 2 * self.columns

    def tiling(self, warps: int | None = None) -> Tiling:
        """How a launch of its own is cut, or blocks of ``warps`` warps beside others.

        Raises:
            ValueError: there are no such blocks.
        """
        if self.packed:
            return packed_tiling(self.packed, sum(self.rows), batch=self.batch, warps=warps)
        return choose_tiling(sum(self.rows), self.columns, batch=self.batch, warps=warps)


@dataclass(frozen=True)
class TileRange:
    """The tiles of one weight among those of the group."""

    number: int
    first: int
    rows: int


def tile_ranges(group: FewGroup, tiling: Tiling) -> tuple[list[TileRange], int]:
    """The tiles of each weight, one after the other, and how many there are in all."""
    ranges, tiles = [], 0
    for number, rows in enumerate(group.rows):
        ranges.append(TileRange(number, tiles, rows))
        tiles += -(-rows // tiling.rows)
    return ranges, tiles


@dataclass(frozen=True)
class GroupRows:
    """From tiles of a block to rows of weights."""

    group: FewGroup
    tiling: Tiling
    ranges: list[TileRange]
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
        self, ranges: list[TileRange], tile: Expr, local: Expr, token: Expr, total: Expr, epilogue: Epilogue
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
