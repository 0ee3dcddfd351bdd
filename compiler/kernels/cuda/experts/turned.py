"""The two products of ``many.py`` on Hopper GPUs with an expert's rows down a tile and its tokens across.

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
    ELEMENT_BYTES,
    Experts,
    ExpertTile,
    bias_of,
    emit_pieces,
    gate_up_rows,
    panel_rows,
    part_rows,
)
from moec.compiler.kernels.cuda.experts.results import store_results
from moec.compiler.kernels.cuda.many.outbox import MOST_SHARED_BYTES, Parcel
from moec.compiler.kernels.cuda.many.panels import PANEL, ROW_BYTES, in_panels, panel_element
from moec.compiler.kernels.cuda.many.side_by_side import row_of
from moec.compiler.kernels.cuda.many.tiles import CHUNK, CHUNK_BYTES, Rows
from moec.compiler.kernels.cuda.many.work import Piece
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import i64, load, when

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moec.compiler.kernels.cuda.many.outbox import Outbox
    from moec.compiler.kernels.cuda.many.tiles import ResultRow
    from moec.compiler.kernels.cuda.many.warpgroup_sums import WarpgroupTile
    from moec.compiler.kernels.emit import Buffer, Expr

    _Put = Callable[[int, Expr], None]
    """Puts two neighbouring columns (a word) of the token that is so many further on."""
    _Places = Callable[[Expr, Expr], _Put]
    """For the first column (int32) and token of a thread within the tile."""

EIGHT = 8
"""Rows and columns of what one instruction turns."""


def emit_gate_up_turned(experts: Experts, tile: WarpgroupTile) -> None:
    """Emit ``middle[place] = activation(gate x, up x)`` of the token of each place.

    Rows of gate and up alternate in the tile by eights, so that a thread has both of a token. It has them of two tokens
    that are neighbours, and stores two rows that are: warps turn what they have made, eight rows of eight tokens at a
    time. A tile's results are whole panels of its tokens: where shared memory has room they go out in one go each.
    """
    body, parts, names = experts.body, experts.parts, names_of_first(experts.body)
    rows, columns = tile.rows // len(names), in_panels(body.intermediate)
    ragged = columns % rows != 0
    panel_bytes = tile.columns * ROW_BYTES
    outbox_bytes = rows // PANEL * panel_bytes
    if tile.stages * tile.stage_bytes + outbox_bytes > MOST_SHARED_BYTES:
        outbox_bytes = 0

    def piece(block: ExpertTile) -> Iterator[Piece]:
        base = T.bind(block.column * i32(rows))

        def make(places: _Places, sums: Buffer, results: list[ResultRow]) -> None:
            biases = {name: bias_of(experts, name, block.address) for name in names}
            for first in range(0, len(results), len(names)):
                sides = dict(zip(names, results[first : first + len(names)], strict=True))
                own = T.bind(row_of(results[first].row, len(names)))
                with when(base + own < i32(columns)) if ragged else nullcontext():
                    _make_middle(experts, places, (base, own), sums, sides, biases)

        def keep(sums: Buffer, results: list[ResultRow]) -> None:
            make(
                lambda column, token: _in_memory(experts, block, T.bind(base + column), token), sums, results
            )

        def send(outbox: Outbox, sums: Buffer, results: list[ResultRow]) -> None:
            outbox.open()
            make(lambda column, token: _in_outbox(outbox, panel_bytes, column, token), sums, results)
            size_bytes = T.bind(block.left * i32(ROW_BYTES))
            parcels = []
            for panel in range(rows // PANEL):
                first = T.bind(base + i32(panel * PANEL))
                target = panel_element(i64(block.first), first, experts.pairs, i32(0))
                exists = first < i32(columns) if ragged else None
                parcels.append(
                    Parcel(panel * panel_bytes, cuda.element(parts.middle, target), size_bytes, exists)
                )
            outbox.send(parcels)

        w = gate_up_rows(experts, base, block.address)
        assert isinstance(w, Rows), "quantized rows are unpacked across a tile"
        tokens = panel_rows(experts, block, parts.gathered, body.hidden)
        yield Piece(w, tokens, keep, send=send if outbox_bytes else None)

    emit_pieces(experts, tile, -(-body.intermediate // rows), piece, outbox_bytes)


def _make_middle(
    experts: Experts,
    places: _Places,
    row: tuple[Expr, Expr],
    sums: Buffer,
    sides: dict[str, ResultRow],
    biases: dict[str, Callable[[Expr], Expr]],
) -> None:
    """Make a warp's eight rows of the middle, of which this thread has one (int32) before they are turned.

    The row is told as the tile's first one, and the number from that on.
    """
    body, (base, inside_tile) = experts.body, row
    columns = next(iter(sides.values())).columns
    own, token = T.bind(base + inside_tile), T.bind(inside_tile % i32(EIGHT))
    known = T.bind(T.min(own, i32(body.intermediate - 1)))
    added = {name: T.bind(bias(known)) for name, bias in biases.items()}
    put = places(T.bind(inside_tile - token + columns[0][0]), token)
    for number in range(len(columns)):
        values = []
        for k in range(2):
            variables = {
                name: load(sums, side.columns[number][1] + k) + added[name] for name, side in sides.items()
            }
            values.append(activated(body, own, variables))
        put(EIGHT * number, cuda.value("uint32", "transpose", pack_middle(body, values)))


def _in_memory(experts: Experts, block: ExpertTile, column: Expr, token: Expr) -> _Put:
    """Each thread stores its own to global memory."""
    start = panel_element(i64(block.first + token), column, experts.pairs, token)
    left = T.bind(block.left - token)

    def put(further: int, word: Expr) -> None:
        with when(i32(further) < left):
            place = start + i64(further * PANEL)
            cuda.call("store_4", cuda.element(experts.parts.middle, place), word)

    return put


def _in_outbox(outbox: Outbox, panel_bytes: int, column: Expr, token: Expr) -> _Put:
    """The same as panels lie in the outbox."""
    panel, inside = column // i32(PANEL), column % i32(PANEL)
    piece = (inside // i32(CHUNK) ^ token) * i32(CHUNK_BYTES) + inside % i32(CHUNK) * i32(ELEMENT_BYTES)
    start = T.bind(panel * i32(panel_bytes) + token * i32(ROW_BYTES) + piece)

    def put(further: int, word: Expr) -> None:
        cuda.call("store_4", outbox.element(start + i32(further * ROW_BYTES)), word)

    return put


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
                        store_results(parts.results, start + i64((EIGHT * number + k) * width), values)

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
