"""What the two products of ``many.py`` share: pieces of work by the tile list, and where their operands are."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.experts.few import names_of_first, packed_row, part_at
from moec.compiler.kernels.cuda.experts.layout import rounding_of
from moec.compiler.kernels.cuda.experts.tile_list import SLOT_WORDS, TileList
from moec.compiler.kernels.cuda.many.panels import PanelRows
from moec.compiler.kernels.cuda.many.side_by_side import kind_of, row_of
from moec.compiler.kernels.cuda.many.tiles import CHUNK, Rows, clamp
from moec.compiler.kernels.cuda.many.warpgroup_sums import WarpgroupTile
from moec.compiler.kernels.cuda.many.work import Piece, Work
from moec.compiler.kernels.cuda.many.work_launch import BlockTile, emit_work
from moec.compiler.kernels.cuda.packed.rows import LOAD_BYTES
from moec.compiler.kernels.cuda.packed.tiles import PackedRows
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.cuda.threads import read
from moec.compiler.kernels.emit import at_address, i64, load, when
from moec.compiler.kernels.linear_shape import padded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moec.artifacts.layout.experts import ExpertLayout
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cuda.experts.layout import Parts
    from moec.compiler.kernels.emit import Buffer, Expr

ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Experts:
    """What both products read."""

    body: ExpertBody
    layout: ExpertLayout
    pairs: Expr
    count: Expr
    """P and E, int64."""
    table: Buffer
    parts: Parts

    def list_of(self, tile: BlockTile) -> TileList:
        """The list of such tiles."""
        parts = self.parts
        return TileList(
            self.pairs, self.count, places_of(tile), turned(tile), self.table, parts.spans, parts.tiles
        )


@dataclass(frozen=True)
class ExpertTile:
    """A piece of work, int32: some of an expert's places, and a tile of its rows."""

    column: Expr
    """The tile's number."""
    address: Expr
    """Of the expert, int64."""
    first: Expr
    left: Expr
    """Places from ``first`` on."""


def turned(tile: BlockTile) -> bool:
    """Whether an expert's tokens are across a tile, and its rows down, see `turned`."""
    return isinstance(tile, WarpgroupTile) and bool(tile.widths)


def places_of(tile: BlockTile) -> int:
    """The most places of a tile."""
    return tile.columns if turned(tile) else tile.rows


def emit_pieces(
    experts: Experts,
    tile: BlockTile,
    across: int,
    piece: Callable[[ExpertTile], Iterator[Piece]],
    outbox_bytes: int = 0,
) -> None:
    """Emit a launch with a piece for each used entry of the tile list and tile of the experts' rows.

    Neighbouring pieces share a tile of places; entries that follow share an expert.
    """
    tiles = experts.parts.tiles

    @contextmanager
    def find(number: Expr) -> Iterator[Piece]:
        words = cuda.registers(SLOT_WORDS, "uint32")
        entry = cuda.element(tiles, i64(number // i32(across)) * i64(SLOT_WORDS))
        cuda.call("load_16", cuda.element(words, 0), entry)
        low, high, first, end = (T.bind(load(words, word)) for word in range(SLOT_WORDS))
        address = T.bind(T.cast(low, "int64") | (T.cast(high, "int64") << i64(32)))
        with when(address != i64(0)):
            first, left = T.bind(T.cast(first, "int32")), T.cast(end - first, "int32")
            yield from piece(ExpertTile(T.bind(number % i32(across)), address, first, T.bind(left)))

    work = Work(
        experts.list_of(tile).slots * i64(across),
        find,
        rounding_of(experts.body).dtype,
        finds_early=False,
        outbox_bytes=outbox_bytes,
    )
    emit_work(tile, work, packed=experts.body.format is not None)


def part_rows(
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


def token_rows(experts: Experts, block: ExpertTile) -> Rows:
    """The rounded tokens of a tile's places."""
    depth = padded(experts.body.hidden)

    def token(row: Expr) -> Expr:
        place = i64(block.first + clamp(row, block.left))
        return load(experts.parts.order, place) * i32(depth // CHUNK)

    return Rows(experts.parts.rounded, i64(0), token, CHUNK, depth, block.left)


def middle_rows(experts: Experts, block: ExpertTile) -> Rows:
    """What the first product made of a tile's places."""
    depth = padded(experts.body.intermediate)
    start = T.bind(i64(block.first) * i64(depth))
    units = i32(depth // CHUNK)
    return Rows(
        experts.parts.middle, start, lambda row: clamp(row, block.left) * units, CHUNK, depth, block.left
    )


def panel_rows(experts: Experts, block: ExpertTile, buffer: Buffer, depth: int) -> PanelRows:
    """A tile's places of what lies in panels."""
    return PanelRows(buffer, i64(block.first), experts.pairs, depth, block.left)


def bias_of(experts: Experts, name: str, address: Expr) -> Callable[[Expr], Expr]:
    """A bias by row, as float32; zero where the expert has none."""
    if f"{name}_bias" not in {part.name for part in experts.layout.parts}:
        return lambda _: T.float32(0)
    buffer = part_at(experts.body, f"{name}_bias", address)
    return lambda row: read(buffer, experts.body.dtype, i64(row))


def gate_up_rows(experts: Experts, base: Expr, address: Expr) -> Rows | PackedRows:
    """A tile's rows of the matrices that meet x, which take turns by eights; ``base`` is the first of each."""
    names = names_of_first(experts.body)
    body, part = experts.body, experts.layout.part(names[0])
    between = experts.layout.part("up").offset_bytes - part.offset_bytes
    row_bytes = part.size_bytes // body.intermediate

    def place(row: Expr, units: int) -> Expr:
        start = T.min(base + row_of(row, len(names)), i32(body.intermediate - 1)) * i32(units)
        if len(names) == 1:
            return start
        return start + kind_of(row, len(names)) * i32(between * units // row_bytes)

    return part_rows(experts, names[0], address, place)
