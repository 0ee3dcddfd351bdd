"""Some rows of a matrix times a strip of tokens: what a thread does at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.many.block import ROWS, Block, Span, spans
from moec.compiler.kernels.cpu.many.cover import cover, tiles_of
from moec.compiler.kernels.cpu.many.product import product
from moec.compiler.kernels.emit import Buffer, Expr, i64, keep, load, loop, scope, splat, store

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cpu.many.tiles import Tiles
    from moec.compiler.kernels.cpu.weights import View


@dataclass(frozen=True)
class StripRows:
    """Rows ``first .. first + count - 1`` of a matrix, and what is added to each one's results."""

    view: View
    first: Expr
    count: int
    bias: Callable[[Expr], Expr | None]
    """Takes a row's number in the matrix."""


def strip(rows: StripRows, tiles: Tiles, first: Expr, tokens: Expr, results: Buffer, place: Expr) -> None:
    """Emit the products with so many tokens, which begin with tile ``first``.

    They go to ``results [tiles, rows, lanes]`` from element ``place``; lanes without a token may get anything.
    """
    depth, lanes = tiles.depth, tiles.depth.machine.lanes
    height = min(ROWS, rows.count)
    with scope():
        block = Block(depth, height, rows.view)
        with loop(-(-rows.count // height)) as number:
            within = keep(T.min(number * i64(height), i64(rows.count - height)))
            begin = keep(rows.first + within)
            block.open(begin)
            with loop(tiles_of(tokens, lanes)) as tile, loop(height) as row:
                shift = rows.bias(begin + row)
                target = place + (tile * i64(rows.count) + within + row) * i64(lanes)
                store(results, target, splat(0.0 if shift is None else shift, lanes), lanes)

            def add(span: Span) -> None:
                block.copy(span)
                cover(
                    depth,
                    tokens,
                    lambda tile_numbers, wanted, most: multiply(tile_numbers, wanted, most, span),
                )

            def multiply(numbers: list[Expr], wanted: int, most: int, span: Span) -> None:
                part = max(size for size in range(1, min(most, height) + 1) if height % size == 0)
                wider = [keep(first + number) for number in numbers]
                with loop(height // part) as turn:
                    row = keep(turn * i64(part))
                    sums = product(block, tiles, wider, wanted, span, row, part)
                    for r, vectors in enumerate(sums):
                        for number, vector in zip(numbers, vectors, strict=True):
                            line = number * i64(rows.count) + within + row + i64(r)
                            target = keep(place + line * i64(lanes))
                            store(results, target, load(results, target, wanted) + vector, wanted)

            spans(depth, add)
