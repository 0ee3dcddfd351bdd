"""How a product goes over its rows and columns: rows one by one for few columns, blocks of them for many."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.emit import Expr, ceildiv, div, either, i64, keep, loop

if TYPE_CHECKING:
    from moec.compiler.kernels.cpu.machine import Machine

STREAM_COLUMNS = 6
"""Up to this many columns the rows are streamed."""
STREAM_WIDTH = 4
"""Columns of one pass over a streamed row; further passes find it in the first-level cache."""

Tile = Callable[[list[Expr]], None]
"""Takes the numbers of a tile's columns."""
Open = Callable[[list[Expr], bool], Tile]
"""Takes row numbers, and whether many columns follow; gives what is done with each tile of columns of these rows."""


def tiles(
    rows: int, columns: Expr, machine: Machine, open_rows: Open, *, stream_rows: int = 1, many: bool = True
) -> None:
    """Cover ``rows`` by ``columns``: ``stream_rows`` at a time for few columns, blocks of rows for many.

    The last tile of several rows moves up so as to stay inside: its first rows are then computed twice. Columns are
    always few without ``many``.
    """

    def few() -> None:
        _row_tiles(rows, stream_rows, lambda numbers: _stream_tile(numbers, columns, open_rows))

    def blocks() -> None:
        _row_tiles(
            rows,
            machine.rows,
            lambda numbers: _column_tiles(columns, (machine.columns, 1), open_rows(numbers, True)),
        )

    if many:
        either(columns <= i64(STREAM_COLUMNS), few, blocks)
    else:
        few()


def stream(rows: Expr, columns: Expr, open_rows: Open) -> None:
    """Cover ``rows`` by few ``columns``, each row by itself."""
    with loop(rows) as row:
        _stream_tile([row], columns, open_rows)


def stream_halves(rows: Expr, columns: Expr, open_rows: Open) -> None:
    """As ``stream``, two rows at a time: one of the first half, one of the second; the last may come twice."""
    half = keep(ceildiv(rows, 2))
    with loop(half) as row:
        pair = [row, keep(T.min(row + half, rows - i64(1)))]
        _stream_tile(pair, columns, open_rows)


def _stream_tile(rows: list[Expr], columns: Expr, open_rows: Open) -> None:
    _column_tiles(columns, (STREAM_WIDTH, 2, 1), open_rows(rows, False))


def _row_tiles(rows: int, most: int, emit: Callable[[list[Expr]], None]) -> None:
    """Tiles of ``most`` rows, or of all."""
    height = min(most, rows)
    with loop(-(-rows // height)) as tile:
        first = keep(T.min(tile * i64(height), i64(rows - height))) if height > 1 else tile
        emit([first + i64(r) for r in range(height)])


def _column_tiles(count: Expr, widths: tuple[int, ...], emit: Tile) -> None:
    """Tiles of the first width as often as they fit, then of the next."""
    done = i64(0)
    for width in widths:
        start = done
        number = keep(div(count - start, width))
        with loop(number) as tile:
            emit([keep(start + tile * i64(width) + i64(c)) for c in range(width)])
        done = keep(start + number * i64(width))
