"""One round of expanded keys and values: latents of chosen runs out of the cache, then products with A and B."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.attention.convert import stored
from moec.compiler.kernels.cuda.attention.expanded.plan import RUN_ROW, counted, find
from moec.compiler.kernels.cuda.attention.operands import Operands, cache_row
from moec.compiler.kernels.cuda.many.panels import PANEL_PIECES, panel_element
from moec.compiler.kernels.cuda.many.tile_product import TileProduct
from moec.compiler.kernels.cuda.many.tiles import CHUNK, ResultRow, Rows, Tile
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import Buffer, Expr, either, i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.compiler.kernels.cuda.attention.expanded.room import Expanded

GATHER_THREADS, GATHER_ROWS = 256, 16
TILE = Tile(rows=128, columns=128, depth=64, warps_down=2, warps_across=2, stages=3)


def emit_gather(operands: Operands, expanded: Expanded, number: Expr, *, panels: bool) -> None:
    """Launch: the latents and shared parts of round ``number``, zeros beyond a run's last position.

    With ``panels`` latents lie as `panels.PanelRows` are read.
    """
    spec, room = expanded.room.spec, expanded.room
    pieces = spec.key_dim // CHUNK
    blocks = tirx.truncdiv(expanded.capacity, i64(GATHER_ROWS))
    with cuda.launch((blocks,), GATHER_THREADS) as ((block,), thread):
        cuda.wait_previous()
        cuda.launch_next()
        begin = T.bind(i32(number) * i32(expanded.capacity) + block * i32(GATHER_ROWS))
        with when(begin < counted(expanded, 2)):
            run = find(expanded, T.bind(thread % i32(32)), begin, RUN_ROW)
            first = T.bind(run.lowest + begin - run.row)
            last = T.bind(run.last)
            with T.serial(i32(0), i32(-(-GATHER_ROWS * pieces // GATHER_THREADS))) as step:
                item = T.bind(step * i32(GATHER_THREADS) + thread)
                row, piece = T.bind(item // i32(pieces)), T.bind(item % i32(pieces))
                position = T.bind(first + row)
                with when(item < i32(GATHER_ROWS * pieces)):
                    words = cuda.registers(4, "uint32")
                    for word in range(4):
                        store(words, word, T.uint32(0))
                    with when(position <= last):
                        source = cache_row(operands, spec, run.sequence, position, i32(0))
                        start = T.bind(source * i64(spec.key_dim) + i64(piece) * i64(CHUNK))
                        cuda.call("load_16", cuda.element(words, 0), cuda.element(operands.k_cache, start))
                    target = T.bind(i64(block) * i64(GATHER_ROWS) + i64(row))
                    either(
                        piece < i32(spec.value_dim // CHUNK),
                        lambda: _store_latent(expanded, target, piece, words, panels=panels),
                        lambda: _store(
                            expanded.shared,
                            target * i64(room.rope_dim) + i64(piece * i32(CHUNK) - i32(spec.value_dim)),
                            words,
                        ),
                    )


def _store_latent(expanded: Expanded, row: Expr, piece: Expr, words: Buffer, *, panels: bool) -> None:
    """Eight entries, as the weights' type."""
    spec, heads = expanded.room.spec, expanded.room.heads
    if panels:
        place = panel_element(row, piece * i32(CHUNK), expanded.capacity, i32(row % i64(PANEL_PIECES)))
    else:
        place = T.bind(row * i64(spec.value_dim) + i64(piece) * i64(CHUNK))
    if heads.dtype == spec.dtype:
        _store(expanded.latents, place, words)
        return
    turned = cuda.registers(4, "uint32")
    for word in range(4):
        pair = cuda.unpack(spec.dtype, T.bind(load(words, word)))
        store(turned, word, cuda.pack(heads.dtype, *pair))
    _store(expanded.latents, place, turned)


def _store(target: Buffer, place: Expr, words: Buffer) -> None:
    values = (T.bind(load(words, word)) for word in range(4))
    cuda.call("store_16", cuda.element(target, T.bind(place)), *values)


@dataclass(frozen=True)
class Half:
    """Keys, or values: the matrix ``[Hq * dim, rank]``, what becomes of it, and its tiles of columns."""

    matrix: Buffer
    target: Buffer
    dim: int
    columns: int

    @property
    def tiles(self) -> int:
        """Of columns."""
        return -(-self.columns // TILE.columns)


def halves_of(operands: Operands, expanded: Expanded) -> tuple[Half, Half]:
    """Keys, and values."""
    assert operands.weights is not None
    spec, heads = expanded.room.spec, expanded.room.heads
    return (
        Half(operands.weights.expand, expanded.keys, heads.nope_dim, spec.query_heads * heads.nope_dim),
        Half(operands.weights.value, expanded.values, heads.value_dim, spec.query_heads * heads.value_dim),
    )


def emit_expand(operands: Operands, expanded: Expanded, number: Expr) -> None:
    """Launch: the keys and values of round ``number``; blocks beyond its rows do nothing."""
    spec, heads = expanded.room.spec, expanded.room.heads
    halves = halves_of(operands, expanded)
    across = sum(half.tiles for half in halves)
    down = tirx.truncdiv(expanded.capacity + i64(TILE.rows - 1), i64(TILE.rows))
    with cuda.launch((across, down), TILE.threads) as ((column, row_tile), thread):
        cuda.wait_previous()
        first = T.bind(row_tile * i32(TILE.rows))
        left = T.bind(counted(expanded, 2) - i32(number) * i32(expanded.capacity) - first)
        with when(left > i32(0)):
            work = TileProduct(TILE, heads.dtype, thread)
            second = T.bind(column >= i32(halves[0].tiles))
            tile = T.bind(T.Select(second, column - i32(halves[0].tiles), column))
            count = T.bind(T.Select(second, i32(halves[1].columns), i32(halves[0].columns)))
            first_column = T.bind(tile * i32(TILE.columns))
            sums = work.multiply(
                _rows(expanded.latents, i64(0), spec.value_dim, first, i32(expanded.capacity) - first),
                _rows(
                    halves[0].matrix,
                    matrix_start(halves, second),
                    spec.value_dim,
                    first_column,
                    count - first_column,
                ),
            )
            cuda.launch_next()
            put_tile(halves, second, work.results(), sums, (first, first_column), expanded, TILE.columns)


def put_tile(
    halves: Sequence[Half],
    second: Expr,
    rows: list[ResultRow],
    sums: Buffer,
    place: tuple[Expr, Expr],
    expanded: Expanded,
    columns: int,
) -> None:
    """Store a tile of one of the two halves, with so many ``columns``, whose first row and column are at ``place``."""
    own, other = (partial(_put_half, half, rows, sums, place, expanded, columns) for half in halves)
    either(second, other, own)


def _put_half(
    half: Half,
    rows: list[ResultRow],
    sums: Buffer,
    place: tuple[Expr, Expr],
    expanded: Expanded,
    columns: int,
) -> None:
    """Pairs of entries of a head."""
    begins = [T.bind(i64(place[0] + result.row) * i64(half.dim)) for result in rows]
    exist = [T.bind(i64(place[0] + result.row) < expanded.capacity) for result in rows]
    for number, (inside, _) in enumerate(rows[0].columns):
        column = T.bind(place[1] + inside)
        with when(column < i32(half.columns)) if half.columns % columns else nullcontext():
            head, entry = column // i32(half.dim), column % i32(half.dim)
            start = T.bind(i64(head) * expanded.capacity * i64(half.dim) + i64(entry))
            for result, begin, exists in zip(rows, begins, exist, strict=True):
                own = result.columns[number][1]
                with when(exists):
                    word = stored(expanded.room.spec.dtype, [load(sums, own), load(sums, own + 1)])[0]
                    cuda.call("store_4", cuda.element(half.target, start + begin), word)


def matrix_start(halves: tuple[Half, Half], second: Expr) -> Expr:
    """Where the matrix begins, in elements from the first one's begin."""
    places = [cuda.value("int64", "address", cuda.element(half.matrix, i64(0))) for half in halves]
    return T.bind(T.Select(second, tirx.truncdiv(places[1] - places[0], i64(2)), i64(0)))


def _rows(buffer: Buffer, start: Expr, depth: int, first: Expr, left: Expr) -> Rows:
    stride = i32(depth // CHUNK)
    begin = T.bind(start + i64(first) * i64(depth))
    return Rows(buffer, begin, lambda row: T.min(row, left - i32(1)) * stride, CHUNK, depth)
