"""The chosen experts of more than a few tokens: products on tensor cores, each over the tokens of one expert.

Sort the pairs (token, choice) by expert; round x; ``middle = activation(gate x, up x)`` of every pair, 16-bit; its
``down`` product; the sum of a token's pairs in their order, each times its weight. The last two go over the columns of
the result slice by slice, since a float32 row for every pair would be most of the memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.experts import layout
from moec.compiler.kernels.cuda.experts.combine import emit_combine
from moec.compiler.kernels.cuda.experts.gather import emit_gather
from moec.compiler.kernels.cuda.experts.grouping import Grouping, emit_grouping
from moec.compiler.kernels.cuda.experts.layout import carve, rounding_of, slice_columns
from moec.compiler.kernels.cuda.experts.pieces import Experts, turned
from moec.compiler.kernels.cuda.experts.products import emit_down, emit_gate_up
from moec.compiler.kernels.cuda.experts.turned import emit_down_turned, emit_gate_up_turned
from moec.compiler.kernels.cuda.many.rounding import emit_round
from moec.compiler.kernels.cuda.many.tiles import Tile
from moec.compiler.kernels.cuda.many.warpgroup_sums import WarpgroupTile
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import either, i64

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cuda.experts.call import ExpertCall
    from moec.compiler.kernels.emit import Expr

Tiles = tuple[tuple[int, "Tile | WarpgroupTile"], ...]
"""Tiles, each up to so many pairs an expert on average: few rows stream the weights, many use them again."""
TILES: Tiles = (
    (24, Tile(rows=32, columns=64, depth=64, warps_down=1, warps_across=4, stages=4)),
    (192, Tile(rows=64, columns=128, depth=64, warps_down=2, warps_across=2, stages=3)),
    (0, Tile(rows=128, columns=128, depth=64, warps_down=2, warps_across=2, stages=3)),
)
HOPPER_PACKED_TILES: Tiles = (
    *TILES[:1],
    (0, WarpgroupTile(rows=128, columns=256, groups=2, stages=4)),
)
"""For Hopper GPUs and quantized experts: a group of warps without rows does nothing."""
HOPPER_TILES: Tiles = (
    *TILES[:1],
    (
        96,
        WarpgroupTile(rows=256, columns=128, groups=2, stages=4, copiers=True, widths=(64, 96, 128)),
    ),
    (
        0,
        WarpgroupTile(
            rows=128,
            columns=256,
            groups=2,
            stages=4,
            copiers=True,
            widths=(64, 128, 160, 176, 192, 208, 224, 256),
        ),
    ),
)
"""For Hopper GPUs: turned, see `turned`."""


def emit_experts_many(body: ExpertBody, call: ExpertCall, top_k: int, tiles: Tiles = TILES) -> None:
    """Emit all launches for a body that is not plain float32; ``top_k`` is the K that the workspace was made for."""
    assert body.dtype != "float32" or body.format, "tensor cores take 16-bit numbers"
    width = slice_columns(body.hidden, top_k)
    pairs = T.bind(call.tokens * call.chosen)
    parts = carve(body, call.workspace, pairs, call.count, width)
    experts = Experts(body, layout(body), pairs, call.count, call.table, parts)
    order = parts.order, parts.places, parts.spans
    emit_grouping(Grouping(call.index, pairs, call.count, call.chosen, *order))

    def by_tile(emit: Callable[[Tile | WarpgroupTile], None]) -> None:
        _by_tile(tiles, pairs, call.count, emit)

    def operand(tile: Tile | WarpgroupTile) -> None:
        listed = experts.list_of(tile)
        if turned(tile):
            emit_gather(body, call, parts, listed)
        else:
            sizes = call.tokens, body.hidden
            emit_round(call.x, parts.rounded, *sizes, rounding_of(body), beside=listed.emit)

    by_tile(operand)
    by_tile(lambda tile: _gate_up(experts, tile))

    def one_slice(first: Expr) -> None:
        by_tile(lambda tile: _down(experts, tile, first, width))
        emit_combine(body, call, parts, first, width)

    slices = -(-body.hidden // width)
    if slices == 1:
        one_slice(i32(0))
        return
    with T.serial(i32(0), i32(slices)) as number:
        one_slice(T.bind(number * i32(width)))


def _gate_up(experts: Experts, tile: Tile | WarpgroupTile) -> None:
    if isinstance(tile, WarpgroupTile) and turned(tile):
        emit_gate_up_turned(experts, tile)
    else:
        emit_gate_up(experts, tile)


def _down(experts: Experts, tile: Tile | WarpgroupTile, first: Expr, width: int) -> None:
    if isinstance(tile, WarpgroupTile) and turned(tile):
        emit_down_turned(experts, tile, first, width)
    else:
        emit_down(experts, tile, first, width)


def _by_tile(tiles: Tiles, pairs: Expr, count: Expr, emit: Callable[[Tile | WarpgroupTile], None]) -> None:
    """Branch on the host to the tile that suits the number of pairs."""

    def choose(left: Tiles) -> None:
        (limit, tile), *rest = left
        if not rest:
            emit(tile)
            return
        either(pairs <= count * i64(limit), lambda: emit(tile), lambda: choose(tuple(rest)))

    choose(tiles)
