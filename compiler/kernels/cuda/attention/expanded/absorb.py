"""Queries of heads to queries of latents, and results of latents to results of heads: products with A^T and B.

Up to eight tokens these are streams through the matrices, exact in float32; more tokens take tensor cores, which leave
out tiles whose tokens all see expanded keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.attention.convert import floats
from moec.compiler.kernels.cuda.attention.marks import any_left, is_done, some_left
from moec.compiler.kernels.cuda.dense.few import emit_linear_few, read_rows
from moec.compiler.kernels.cuda.dense.few_block import FewProduct
from moec.compiler.kernels.cuda.dense.few_group import FewGroup
from moec.compiler.kernels.cuda.many.tile_product import TileProduct
from moec.compiler.kernels.cuda.many.tiles import CHUNK, Rows, Tile, clamp
from moec.compiler.kernels.cuda.primitives import LANES, i32
from moec.compiler.kernels.cuda.threads import read, registers, threads
from moec.compiler.kernels.emit import Buffer, Expr, ceildiv, div, i64, load, loop, mod, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cuda.attention.expanded.room import Absorbed, Room
    from moec.compiler.kernels.cuda.attention.operands import Operands

ROUND_THREADS, MOST_ROUND_BLOCKS = 256, 1056
SMALL = Tile(rows=64, columns=128, depth=64, warps_down=2, warps_across=2, stages=3)
LARGE = Tile(rows=128, columns=128, depth=64, warps_down=2, warps_across=2, stages=3)


def latent_operands(operands: Operands, absorbed: Absorbed) -> Operands:
    """The operands of a kernel that attends to latents."""
    return replace(operands, q=absorbed.queries, out=absorbed.results)


def _row(room: Room, token: Expr, head: Expr, size: int) -> Expr:
    """The element of a ``[T, Hq, size]`` tensor where a head begins; int64."""
    return (i64(token) * i64(room.spec.query_heads) + i64(head)) * i64(size)


def _keep_shared(room: Room, operands: Operands, absorbed: Absorbed, place: tuple[Expr, Expr, Expr]) -> None:
    """What meets the shared part of keys stays as it is: whoever has column ``column`` copies entry ``column``."""
    token, head, column = place
    spec, nope = room.spec, room.heads.nope_dim
    with when(column < i32(room.rope_dim)):
        source = _row(room, token, head, spec.query_dim) + i64(nope) + i64(column)
        target = _row(room, token, head, spec.key_dim) + i64(spec.value_dim) + i64(column)
        store(absorbed.queries, target, load(operands.q, source))


def absorb_few(room: Room, operands: Operands, absorbed: Absorbed) -> None:
    """Launch: queries of latents, for at most eight tokens."""
    assert operands.weights is not None
    spec, heads = room.spec, room.heads
    assert spec.value_dim >= room.rope_dim, "the product's columns carry the shared part along"

    def finish(_number: int, head: Expr, token: Expr, row: Expr, total: Expr) -> None:
        store(absorbed.queries, _row(room, token, head, spec.key_dim) + i64(row), total)
        _keep_shared(room, operands, absorbed, (token, head, row))

    queries = read_rows(operands.q, lambda token, head: _row(room, token, head, spec.query_dim))
    group = FewGroup((spec.value_dim,), heads.nope_dim, heads.dtype, spec.query_heads)
    matrices = [operands.weights.absorb]
    emit_linear_few(FewProduct(group, matrices, operands.tokens, queries, finish, group.tiling()))


def project_few(room: Room, operands: Operands, absorbed: Absorbed) -> None:
    """Launch: results of heads, for at most eight tokens."""
    assert operands.weights is not None
    spec, heads = room.spec, room.heads

    def finish(_number: int, head: Expr, token: Expr, row: Expr, total: Expr) -> None:
        store(operands.out, _row(room, token, head, heads.value_dim) + i64(row), total)

    results = read_rows(absorbed.results, lambda token, head: _row(room, token, head, spec.value_dim))
    group = FewGroup((heads.value_dim,), spec.value_dim, heads.dtype, spec.query_heads)
    matrices = [operands.weights.value]
    emit_linear_few(FewProduct(group, matrices, operands.tokens, results, finish, group.tiling()))


def absorb_many(room: Room, operands: Operands, absorbed: Absorbed) -> None:
    """Launches: queries rounded, then multiplied; of tokens that are not done."""
    assert operands.weights is not None
    spec, nope = room.spec, room.heads.nope_dim
    _round(room, operands, (operands.q, spec.query_dim), (absorbed.rounded_queries, nope))

    def finish(token: Expr, head: Expr, column: Expr, low: Expr, high: Expr) -> None:
        place = T.bind(_row(room, token, head, spec.key_dim) + i64(column))
        cuda.call("store_pair", cuda.element(absorbed.queries, place), low, high)
        for odd in range(2):
            _keep_shared(room, operands, absorbed, (token, head, T.bind(column + i32(odd))))

    rows = (absorbed.rounded_queries, nope)
    _multiply(room, operands, rows, (operands.weights.absorb, spec.value_dim), finish)


def project_many(room: Room, operands: Operands, absorbed: Absorbed) -> None:
    """Launches: results rounded, unless they are, then multiplied; of tokens that are not done."""
    assert operands.weights is not None
    heads, rank = room.heads, room.spec.value_dim
    if not room.rounds:
        _round(room, operands, (absorbed.results, rank), (absorbed.rounded_results, rank))

    def finish(token: Expr, head: Expr, column: Expr, low: Expr, high: Expr) -> None:
        place = T.bind(_row(room, token, head, heads.value_dim) + i64(column))
        cuda.call("store_pair", cuda.element(operands.out, place), low, high)

    rows = (absorbed.rounded_results, rank)
    _multiply(room, operands, rows, (operands.weights.value, heads.value_dim), finish)


def _round(room: Room, operands: Operands, source: tuple[Buffer, int], target: tuple[Buffer, int]) -> None:
    """Launch: the first entries of each head of ``source`` (heads of so many), as the weights' type."""
    (x, stride), (rounded, size) = source, target
    pieces = size // CHUNK
    count = T.bind(operands.tokens * i64(room.spec.query_heads * pieces))
    blocks = T.bind(T.min(ceildiv(count, ROUND_THREADS), i64(MOST_ROUND_BLOCKS)))
    with cuda.launch((blocks,), ROUND_THREADS) as ((block,), thread):
        cuda.wait_previous()
        cuda.launch_next()
        turns = tirx.truncdiv(ceildiv(count, ROUND_THREADS) + blocks - i64(1), blocks)
        with when(some_left(operands.done)), T.serial(i64(0), turns) as step:
            number = T.bind((step * blocks + i64(block)) * i64(ROUND_THREADS) + i64(thread))
            with (
                when(number < count),
                when(T.Not(is_done(operands.done, div(number, room.spec.query_heads * pieces)))),
            ):
                row, piece = T.bind(div(number, pieces)), T.bind(mod(number, pieces))
                values = floats(x, T.bind(row * i64(stride) + piece * i64(CHUNK)), CHUNK)
                words = [cuda.pack(room.heads.dtype, *values[k : k + 2]) for k in range(0, CHUNK, 2)]
                cuda.call("store_16", cuda.element(rounded, number * i64(CHUNK)), *words)


def _multiply(
    room: Room,
    operands: Operands,
    left: tuple[Buffer, int],
    right: tuple[Buffer, int],
    finish: Callable[[Expr, Expr, Expr, Expr, Expr], None],
) -> None:
    """Launch: for each head the product of its rows of ``left`` with its matrix; stored with ``finish``."""
    (a, depth), (matrix, columns) = left, right
    heads, done = room.spec.query_heads, operands.done
    tile = SMALL if done is None else LARGE
    grid = (-(-columns // tile.columns), ceildiv(operands.tokens, tile.rows), heads)
    with cuda.launch(grid, tile.threads) as ((column_tile, row_tile, head), thread):
        cuda.wait_previous()
        first = T.bind(row_tile * i32(tile.rows))
        end = T.bind(T.min(first + i32(tile.rows), i32(operands.tokens)))
        begin_column = T.bind(column_tile * i32(tile.columns))
        with when(any_left(done, first, end, tile.rows, T.bind(thread % i32(LANES)))):
            work = TileProduct(tile, room.heads.dtype, thread)
            begin = T.bind((i64(first) * i64(heads) + i64(head)) * i64(depth))
            matrix_begin = T.bind((i64(head) * i64(columns) + i64(begin_column)) * i64(depth))
            sums = work.multiply(
                Rows(a, begin, _offset(end - first, heads * depth), CHUNK, depth),
                Rows(matrix, matrix_begin, _offset(i32(columns) - begin_column, depth), CHUNK, depth),
            )
            cuda.launch_next()
            for result in work.results():
                token = T.bind(T.min(first + result.row, end - i32(1)))
                with when(T.And(first + result.row < end, T.Not(is_done(done, token)))):
                    for inside, place in result.columns:
                        column = T.bind(begin_column + inside)
                        with when(column < i32(columns)):
                            finish(token, head, column, load(sums, place), load(sums, place + 1))


def _offset(left: Expr, stride: int) -> Callable[[Expr], Expr]:
    """From a row of a tile to where it begins; those beyond the ``left`` that there are are read as the last."""
    return lambda row: clamp(row, left) * i32(stride // CHUNK)


def absorb_plain(room: Room, operands: Operands, absorbed: Absorbed) -> None:
    """Launches: queries of latents for any number of tokens and any type, one thread a number."""
    assert operands.weights is not None
    spec, heads = room.spec, room.heads
    source = (operands.q, spec.query_dim)
    target = (absorbed.queries, spec.key_dim)
    _multiply_plain(room, operands, source, (operands.weights.absorb, spec.value_dim, heads.nope_dim), target)
    with threads(operands.tokens * i64(spec.query_heads * room.rope_dim)) as number:
        row, column = T.bind(div(number, room.rope_dim)), T.bind(mod(number, room.rope_dim))
        rotated = load(operands.q, row * i64(spec.query_dim) + i64(heads.nope_dim) + column)
        store(absorbed.queries, row * i64(spec.key_dim) + i64(spec.value_dim) + column, rotated)


def project_plain(room: Room, operands: Operands, absorbed: Absorbed) -> None:
    """Launch: results of heads for any number of tokens and any type, one thread a number."""
    assert operands.weights is not None
    rank, size = room.spec.value_dim, room.heads.value_dim
    source = (absorbed.results, rank)
    _multiply_plain(room, operands, source, (operands.weights.value, size, rank), (operands.out, size))


def _multiply_plain(
    room: Room,
    operands: Operands,
    source: tuple[Buffer, int],
    right: tuple[Buffer, int, int],
    target: tuple[Buffer, int],
) -> None:
    (x, stride), (matrix, columns, depth), (out, out_stride) = source, right, target
    heads = room.spec.query_heads
    with threads(operands.tokens * i64(heads * columns)) as number:
        row, column = T.bind(div(number, columns)), T.bind(mod(number, columns))
        start = T.bind((mod(row, heads) * i64(columns) + column) * i64(depth))
        total = registers(1)
        store(total, 0, T.float32(0))
        with loop(depth) as k:
            product = load(x, row * i64(stride) + k) * read(matrix, room.heads.dtype, start + k)
            store(total, 0, load(total, 0) + product)
        store(out, row * i64(out_stride) + column, load(total, 0))
