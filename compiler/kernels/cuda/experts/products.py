"""The two products of ``many.py`` with the pairs of one expert down a tile and its rows across."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.experts.few import names_of_first
from moec.compiler.kernels.cuda.experts.middle import activated, pack_middle
from moec.compiler.kernels.cuda.experts.pieces import (
    Experts,
    ExpertTile,
    bias_of,
    emit_pieces,
    gate_up_rows,
    middle_rows,
    part_rows,
    token_rows,
)
from moec.compiler.kernels.cuda.experts.results import store_results
from moec.compiler.kernels.cuda.many.side_by_side import groups_of
from moec.compiler.kernels.cuda.many.work import Piece
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import i64, load, when
from moec.compiler.kernels.linear_shape import padded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.kernels.cuda.many.tiles import ResultRow
    from moec.compiler.kernels.cuda.many.work_launch import BlockTile
    from moec.compiler.kernels.emit import Buffer, Expr


def emit_gate_up(experts: Experts, tile: BlockTile) -> None:
    """Emit ``middle[place] = activation(gate x, up x)`` of the token of each place.

    Rows of gate and up alternate in the tile by eights, so that a thread has both of a column.
    """
    body, parts, names = experts.body, experts.parts, names_of_first(experts.body)
    columns = tile.columns // len(names)

    def piece(block: ExpertTile) -> Iterator[Piece]:
        base = T.bind(block.column * i32(columns))

        def keep(sums: Buffer, results: list[ResultRow]) -> None:
            biases = {name: bias_of(experts, name, block.address) for name in names}

            def value(row: Expr, sides: list[int], number: int) -> Expr:
                own = T.bind(row + i32(number))
                pairs = zip(names, sides, strict=True)
                variables = {name: load(sums, place + number) + biases[name](own) for name, place in pairs}
                return activated(body, own, variables)

            for result in results:
                with when(result.row < block.left):
                    start = T.bind(i64(block.first + result.row) * i64(padded(body.intermediate)))
                    for row, sides in groups_of(result, len(names), base, padded(body.intermediate), columns):
                        word = pack_middle(body, [value(row, sides, number) for number in range(2)])
                        cuda.call("store_4", cuda.element(parts.middle, start + i64(row)), word)

        yield Piece(token_rows(experts, block), gate_up_rows(experts, base, block.address), keep)

    emit_pieces(experts, tile, -(-padded(body.intermediate) // columns), piece)


def emit_down(experts: Experts, tile: BlockTile, first_column: Expr, width: int) -> None:
    """Emit ``results[place, n] = (down middle + bias)[first_column + n]`` for a slice of columns."""
    body, parts = experts.body, experts.parts

    def piece(block: ExpertTile) -> Iterator[Piece]:
        base = T.bind(first_column + block.column * i32(tile.columns))

        def weight_row(row: Expr, units: int) -> Expr:
            return T.min(base + row, i32(body.hidden - 1)) * i32(units)

        def keep(sums: Buffer, results: list[ResultRow]) -> None:
            bias = bias_of(experts, "down", block.address)
            for result in results:
                with when(result.row < block.left):
                    place = i64(block.first + result.row)
                    start = T.bind(place * i64(width) + i64(block.column * i32(tile.columns)))
                    for column, number in result.columns:
                        values = [load(sums, number + k) + bias(base + column + i32(k)) for k in range(2)]
                        store_results(parts.results, start + i64(column), values)

        with when(base < i32(body.hidden)):
            w = part_rows(experts, "down", block.address, weight_row)
            yield Piece(middle_rows(experts, block), w, keep)

    emit_pieces(experts, tile, width // tile.columns, piece)
