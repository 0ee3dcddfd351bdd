"""Products whose results are stored together: ``out[t, n] = f(sum_k a[t, k] * w0[n, k], sum_k a[t, k] * w1[n, k])``."""

from __future__ import annotations

from contextlib import contextmanager
from functools import reduce
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.many.gemm import address_of, left_rows, order, tiles_down
from moec.compiler.kernels.cuda.many.side_by_side import groups_of, kind_of, row_of
from moec.compiler.kernels.cuda.many.tiles import CHUNK, CHUNK_BYTES, Rows
from moec.compiler.kernels.cuda.many.work import Piece, Work
from moec.compiler.kernels.cuda.many.work_launch import BlockTile, emit_work
from moec.compiler.kernels.cuda.packed.rows import LOAD_BYTES
from moec.compiler.kernels.cuda.packed.tiles import PackedRows
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import at_address, i64, load, when

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moec.compiler.kernels.cuda.many.gemm import Operand, Part
    from moec.compiler.kernels.cuda.many.tiles import ResultRow
    from moec.compiler.kernels.emit import Buffer, Expr

    Store = Callable[[Expr, Expr, list[list[Expr]]], None]


def emit_joint(a: Operand, parts: Sequence[Part], tile: BlockTile, store: Store) -> None:
    """Emit one launch.

    Args:
        a: as for `gemm.emit_parts`.
        parts: one or two products alike, not of a batch, N and K multiples of 8. Their weights lie within 64 GiB; their
            epilogues are not used.
        tile: of a block.
        store: emits what stores results, given their row (int32), the first of two neighbouring columns (int32, even)
            and each part's sums of both.
    """
    product, kinds = parts[0].product, len(parts)
    columns = tile.columns // kinds
    across = -(-product.rows // columns)
    down = tiles_down(product, tile)

    @contextmanager
    def piece(number: Expr) -> Iterator[Piece]:
        row_tile, column_tile = order(number, down, across, tile)
        first_row, first = T.bind(row_tile * i32(tile.rows)), T.bind(column_tile * i32(columns))
        rows_left = T.bind(i32(product.tokens) - first_row)
        left = left_rows(a, product, tile, i32(0), (first_row, rows_left))

        def keep(sums: Buffer, results: list[ResultRow]) -> None:
            for result in results:
                with when(result.row < rows_left):
                    row = T.bind(first_row + result.row)
                    for column, places in groups_of(result, kinds, first, product.rows, columns):
                        store(row, column, [[load(sums, place + k) for k in range(2)] for place in places])

        yield Piece(left, _weight_rows(parts, first), keep, product.terms)

    work = Work(down * i64(across), piece, product.dtype, finds_early=True)
    emit_work(tile, work, packed=product.packed is not None)


def _weight_rows(parts: Sequence[Part], first: Expr) -> Rows | PackedRows:
    """Rows that take turns by eights, counted from the matrix that lies lowest."""
    product, kinds = parts[0].product, len(parts)
    addresses = [address_of(part.weight) for part in parts]
    lowest = T.bind(reduce(T.min, addresses))
    unit_bytes = LOAD_BYTES if product.packed else CHUNK_BYTES
    units = product.packed.layout.row_bytes // LOAD_BYTES if product.packed else product.depth // CHUNK
    starts = [T.bind(T.truncdiv(address - lowest, i64(unit_bytes))) for address in addresses]

    def offset(row: Expr) -> Expr:
        own = T.min(first + row_of(row, kinds), i32(product.rows - 1)) * i32(units)
        start = starts[0] if kinds == 1 else T.Select(kind_of(row, kinds) == i32(0), *starts)
        return start + i64(own)

    if product.packed:
        return PackedRows(lowest, offset, product.packed)
    most = product.rows * product.depth
    return Rows(at_address(lowest, most, product.dtype), i64(0), offset, CHUNK, product.depth)
