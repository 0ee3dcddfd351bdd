"""The two products of ``experts_many``: a block takes a tile of one expert's pairs and a tile of its rows."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.activation import QUICK, evaluate
from moec.compiler.kernels.cuda.experts_few import packed_row, part_at
from moec.compiler.kernels.cuda.experts_layout import rounding_of
from moec.compiler.kernels.cuda.gemm import store_pair
from moec.compiler.kernels.cuda.grouping import SLOT_WORDS, slots
from moec.compiler.kernels.cuda.packed.rows import LOAD_BYTES
from moec.compiler.kernels.cuda.packed.tiles import PackedRows
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.cuda.side_by_side import groups_of, kind_of, row_of
from moec.compiler.kernels.cuda.threads import read
from moec.compiler.kernels.cuda.tiles import CHUNK, Rows, clamp
from moec.compiler.kernels.cuda.work import Piece, Work
from moec.compiler.kernels.cuda.work_launch import BlockTile, emit_work
from moec.compiler.kernels.emit import at_address, i64, load, when
from moec.compiler.kernels.linear_shape import padded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moec.artifacts.experts import ExpertLayout
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cuda.experts_layout import Parts
    from moec.compiler.kernels.cuda.tiles import ResultRow
    from moec.compiler.kernels.emit import Buffer, Expr

ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Experts:
    """What both products read."""

    body: ExpertBody
    layout: ExpertLayout
    table: Buffer
    chosen: Expr
    pairs: Expr
    count: Expr
    """K, P and E, int64."""
    weight: Buffer
    parts: Parts


@dataclass(frozen=True)
class _Tile:
    """A piece of work, int32: the expert's places and the tile of columns."""

    column: Expr
    address: Expr
    """Of the expert, int64."""
    first: Expr
    left: Expr
    """Places from ``first`` to the end of the expert's."""


def _emit(experts: Experts, tile: BlockTile, across: int, piece: Callable[[_Tile], Iterator[Piece]]) -> None:
    """Emit a launch with a piece for each used entry of the tile list and tile of columns.

    Neighbouring pieces share a tile of pairs; entries that follow share an expert.
    """
    tiles = experts.parts.tiles

    @contextmanager
    def find(number: Expr) -> Iterator[Piece]:
        entry = T.bind(i64(number // i32(across)) * i64(SLOT_WORDS))
        expert = T.bind(load(tiles, entry))
        with when(expert >= i32(0)):
            first, end = T.bind(load(tiles, entry + i64(1))), T.bind(load(tiles, entry + i64(2)))
            address = T.bind(load(experts.table, i64(expert)))
            yield from piece(_Tile(T.bind(number % i32(across)), address, first, T.bind(end - first)))

    entries = slots(experts.pairs, experts.count, i64(tile.rows))
    work = Work(
        entries * i64(across),
        find,
        rounding_of(experts.body).dtype,
        finds_early=False,
    )
    emit_work(tile, work, packed=experts.body.format is not None)


def _rows(
    experts: Experts, name: str, address: Expr, place: Callable[[Expr, int], Expr]
) -> Rows | PackedRows:
    """A tile's rows of a matrix of the expert; ``place(row of the tile, units of a row)`` says where, in units."""
    body, part = experts.body, experts.layout.part(name)
    start = address + i64(part.offset_bytes)
    columns = body.intermediate if name == "down" else body.hidden
    packed = packed_row(body, columns)
    if packed is not None:
        units = packed.layout.row_bytes // LOAD_BYTES
        return PackedRows(T.bind(start), lambda row: place(row, units), packed)
    unit = CHUNK if columns % CHUNK == 0 else 1
    buffer = at_address(start, part.size_bytes // ELEMENT_BYTES, body.dtype)
    return Rows(buffer, i64(0), lambda row: place(row, columns // unit), unit, columns)


def _bias(experts: Experts, name: str, address: Expr) -> Callable[[Expr], Expr]:
    """A bias by row, as float32; zero where the expert has none."""
    if f"{name}_bias" not in {part.name for part in experts.layout.parts}:
        return lambda _: T.float32(0)
    buffer = part_at(experts.body, f"{name}_bias", address)
    return lambda row: read(buffer, experts.body.dtype, i64(row))


def emit_gate_up(experts: Experts, tile: BlockTile) -> None:
    """Emit ``middle[place] = activation(gate x, up x)`` of the token of each place.

    Rows of gate and up alternate in the tile by eights, so that a thread has both of a column.
    """
    body, parts = experts.body, experts.parts
    names = ("gate", "up") if body.gated else ("up",)
    columns = tile.columns // len(names)

    def piece(block: _Tile) -> Iterator[Piece]:
        base = T.bind(block.column * i32(columns))

        def token(row: Expr) -> Expr:
            pair = load(parts.order, i64(block.first + clamp(row, block.left)))
            return tirx.truncdiv(pair, i32(experts.chosen)) * i32(padded(body.hidden) // CHUNK)

        def keep(sums: Buffer, results: list[ResultRow]) -> None:
            biases = {name: _bias(experts, name, block.address) for name in names}
            for result in results:
                with when(result.row < block.left):
                    start = T.bind(i64(block.first + result.row) * i64(padded(body.intermediate)))
                    for row, sides in groups_of(result, len(names), base, padded(body.intermediate), columns):
                        places = dict(zip(names, sides, strict=True))
                        _activate(experts, sums, places, biases, row, start)

        a = Rows(parts.rounded, i64(0), token, CHUNK, padded(body.hidden), block.left)
        yield Piece(a, _gate_up_rows(experts, names, base, block.address), keep)

    _emit(experts, tile, -(-padded(body.intermediate) // columns), piece)


def _gate_up_rows(experts: Experts, names: tuple[str, ...], base: Expr, address: Expr) -> Rows | PackedRows:
    body, part = experts.body, experts.layout.part(names[0])
    between = experts.layout.part("up").offset_bytes - part.offset_bytes
    row_bytes = part.size_bytes // body.intermediate

    def place(row: Expr, units: int) -> Expr:
        start = T.min(base + row_of(row, len(names)), i32(body.intermediate - 1)) * i32(units)
        if len(names) == 1:
            return start
        return start + kind_of(row, len(names)) * i32(between * units // row_bytes)

    return _rows(experts, names[0], address, place)


def _activate(
    experts: Experts,
    sums: Buffer,
    places: dict[str, int],
    biases: dict[str, Callable[[Expr], Expr]],
    row: Expr,
    start: Expr,
) -> None:
    """Store the middle's values of ``row`` and the next; those beyond the last are zeros."""
    body = experts.body
    values = []
    for number in range(2):
        own = T.bind(row + i32(number))
        variables = {
            name: T.bind(load(sums, place + number) + biases[name](own)) for name, place in places.items()
        }
        value = evaluate(body.activation, variables, QUICK)
        if body.intermediate % CHUNK:
            value = T.Select(own < i32(body.intermediate), value, T.float32(0))
        values.append(value)
    rounding = rounding_of(body)
    word = cuda.pack(rounding.dtype, *(rounding.scaled(value) for value in values))
    cuda.call("store_4", cuda.element(experts.parts.middle, start + i64(row)), word)


def emit_down(experts: Experts, tile: BlockTile, first_column: Expr, width: int) -> None:
    """Emit ``results[pair, n] = weight[pair] * (down middle + bias)[first_column + n]`` for a slice of columns."""
    body, parts = experts.body, experts.parts
    depth = padded(body.intermediate)

    def piece(block: _Tile) -> Iterator[Piece]:
        base = T.bind(first_column + block.column * i32(tile.columns))

        def place(row: Expr) -> Expr:
            return clamp(row, block.left) * i32(depth // CHUNK)

        def weight_row(row: Expr, units: int) -> Expr:
            return T.min(base + row, i32(body.hidden - 1)) * i32(units)

        def keep(sums: Buffer, results: list[ResultRow]) -> None:
            bias = _bias(experts, "down", block.address)
            for result in results:
                with when(result.row < block.left):
                    pair = T.bind(i64(load(parts.order, i64(block.first + result.row))))
                    factor = T.bind(load(experts.weight, pair))
                    start = T.bind(pair * i64(width) + i64(block.column * i32(tile.columns)))
                    for column, place in result.columns:
                        values = tuple(
                            factor * (load(sums, place + k) + bias(base + column + i32(k))) for k in range(2)
                        )
                        store_pair(parts.results, start + i64(column), values)

        with when(base < i32(body.hidden)):
            start = T.bind(i64(block.first) * i64(depth))
            a = Rows(parts.middle, start, place, CHUNK, depth, block.left)
            yield Piece(a, _rows(experts, "down", block.address, weight_row), keep)

    _emit(experts, tile, width // tile.columns, piece)
