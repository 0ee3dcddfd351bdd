"""The two products of ``experts_many`` on Hopper GPUs with an expert's rows down a tile and its tokens across.

Products of four warps take 64 rows, but as many columns as there are, in steps: of tokens across no more are multiplied
than the next step has, and all that fit share one reading of the weights. Both products find the tokens in panels, so
that a tile's are copied at once.
"""

from __future__ import annotations

from contextlib import nullcontext
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
    panel_rows,
    part_rows,
)
from moec.compiler.kernels.cuda.many.gemm import store_pair
from moec.compiler.kernels.cuda.many.panels import PANEL, in_panels, panel_element
from moec.compiler.kernels.cuda.many.side_by_side import row_of
from moec.compiler.kernels.cuda.many.tiles import Rows
from moec.compiler.kernels.cuda.many.work import Piece
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import i64, load, when

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moec.compiler.kernels.cuda.many.tiles import ResultRow
    from moec.compiler.kernels.cuda.many.warpgroup_sums import WarpgroupTile
    from moec.compiler.kernels.emit import Buffer, Expr

EIGHT = 8
"""Rows and columns of what one instruction turns."""


def emit_gate_up_turned(experts: Experts, tile: WarpgroupTile) -> None:
    """Emit ``middle[place] = activation(gate x, up x)`` of the token of each place.

    Rows of gate and up alternate in the tile by eights, so that a thread has both of a token. It has them of two tokens
    that are neighbours, and stores two rows that are: warps turn what they have made, eight rows of eight tokens at a
    time.
    """
    body, parts, names = experts.body, experts.parts, names_of_first(experts.body)
    rows = tile.rows // len(names)
    ragged = in_panels(body.intermediate) % rows != 0

    def piece(block: ExpertTile) -> Iterator[Piece]:
        base = T.bind(block.column * i32(rows))

        def keep(sums: Buffer, results: list[ResultRow]) -> None:
            biases = {name: bias_of(experts, name, block.address) for name in names}
            for first in range(0, len(results), len(names)):
                sides = dict(zip(names, results[first : first + len(names)], strict=True))
                own = T.bind(base + row_of(results[first].row, len(names)))
                with when(own < i32(in_panels(body.intermediate))) if ragged else nullcontext():
                    _keep_middle(experts, block, own, sums, sides, biases)

        w = gate_up_rows(experts, base, block.address)
        assert isinstance(w, Rows), "quantized rows are unpacked across a tile"
        yield Piece(w, panel_rows(experts, block, parts.gathered, body.hidden), keep)

    emit_pieces(experts, tile, -(-body.intermediate // rows), piece)


def _keep_middle(
    experts: Experts,
    block: ExpertTile,
    own: Expr,
    sums: Buffer,
    sides: dict[str, ResultRow],
    biases: dict[str, Callable[[Expr], Expr]],
) -> None:
    """Store a warp's eight rows of the middle, of which this thread has row ``own`` (int32) before they are turned."""
    body = experts.body
    columns = next(iter(sides.values())).columns
    inside = T.bind(own % i32(EIGHT))
    known = T.bind(T.min(own, i32(body.intermediate - 1)))
    added = {name: T.bind(bias(known)) for name, bias in biases.items()}
    column = own - inside + columns[0][0]
    start = panel_element(i64(block.first + inside), column, experts.pairs, inside)
    left = T.bind(block.left - inside)
    for number in range(len(columns)):
        values = []
        for k in range(2):
            variables = {
                name: load(sums, side.columns[number][1] + k) + added[name] for name, side in sides.items()
            }
            values.append(activated(body, own, variables))
        word = cuda.value("uint32", "transpose", pack_middle(body, values))
        with when(i32(EIGHT * number) < left):
            place = start + i64(EIGHT * number * PANEL)
            cuda.call("store_4", cuda.element(experts.parts.middle, place), word)


def emit_down_turned(experts: Experts, tile: WarpgroupTile, first_column: Expr, width: int) -> None:
    """Emit ``results[place, n] = (down middle + bias)[first_column + n]`` for a slice of columns.

    The expert's rows are in such an order in the tile that a thread has neighbours.
    """
    body, parts = experts.body, experts.parts

    def piece(block: ExpertTile) -> Iterator[Piece]:
        base = T.bind(first_column + block.column * i32(tile.rows))

        def weight_row(row: Expr, units: int) -> Expr:
            return T.min(base + _column_of(tile, row), i32(body.hidden - 1)) * i32(units)

        def keep(sums: Buffer, results: list[ResultRow]) -> None:
            bias = bias_of(experts, "down", block.address)
            own = T.bind(_column_of(tile, results[0].row))
            last = i32(body.hidden - 1)
            added = [T.bind(bias(T.min(base + own + i32(number), last))) for number in range(len(results))]
            column = T.bind(block.column * i32(tile.rows) + own)
            token = results[0].columns[0][0]
            start = T.bind(i64(block.first + token) * i64(width) + i64(column))
            left = T.bind(block.left - token)
            for number in range(len(results[0].columns)):
                for k in range(2):
                    values = [
                        T.bind(load(sums, result.columns[number][1] + k) + extra)
                        for result, extra in zip(results, added, strict=True)
                    ]
                    with when(i32(EIGHT * number + k) < left):
                        _store(parts.results, start + i64((EIGHT * number + k) * width), values)

        with when(base < i32(body.hidden)):
            w = part_rows(experts, "down", block.address, weight_row)
            assert isinstance(w, Rows)
            yield Piece(w, panel_rows(experts, block, parts.middle, body.intermediate), keep)

    emit_pieces(experts, tile, width // tile.rows, piece)


def _column_of(tile: WarpgroupTile, row: Expr) -> Expr:
    """Which column of the result a row of the tile is for, so that those of one thread are neighbours.

    A thread has rows r and r + 8 of a warp's 16, in each product of its group.
    """
    of_group = tile.rows // tile.groups
    group, inside = row // i32(of_group), row % i32(of_group)
    part, warp = inside // i32(64), inside % i32(64) // i32(16)
    half, lane = inside % i32(16) // i32(EIGHT), inside % i32(EIGHT)
    own = (warp * i32(EIGHT) + lane) * i32(2 * tile.parts) + part * i32(2) + half
    return group * i32(of_group) + own


def _store(results: Buffer, place: Expr, values: list[Expr]) -> None:
    """Store two or four neighbours, at a multiple of as many."""
    if len(values) == 2:
        store_pair(results, place, tuple(values))
        return
    words = [T.reinterpret("uint32", value) for value in values]
    cuda.call("store_16", cuda.element(results, place), *words)
