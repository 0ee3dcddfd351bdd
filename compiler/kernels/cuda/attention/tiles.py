"""Tiles of queries, keys and values in shared memory.

A row is padded to an odd number of 16-byte pieces: eight rows at the same column lie in eight different groups of
banks, which is what ``ldmatrix`` wants, and addresses stay sums.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cuda.attention.convert import clamped, floats
from moec.compiler.kernels.cuda.attention.operands import Operands, query_scale
from moec.compiler.kernels.cuda.primitives import call, element, i32, pack, registers
from moec.compiler.kernels.emit import Buffer, Expr, either, i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.kernels.cuda.attention.rows import Place, Segment
    from moec.compiler.kernels.cuda.many.panels import Panels

PIECE = 8
"""Elements in 16 bytes."""


@dataclass(frozen=True)
class Tile:
    """A matrix of 16-bit elements in shared memory."""

    memory: Buffer
    start: int | Expr
    """Byte offset."""
    rows: int
    size: int
    """Elements of a row that exist."""

    @property
    def pieces(self) -> int:
        """16-byte pieces of a row, an even number: the last may be there for alignment and is zero."""
        return -(-self.size // 16) * 2

    @property
    def pitch(self) -> int:
        """Bytes from row to row."""
        return 16 * (self.pieces + 1)

    @property
    def end(self) -> int:
        """Byte offset behind a tile whose start is a number."""
        assert isinstance(self.start, int)
        return self.start + self.rows * self.pitch

    def at(self, row: Expr, piece: Expr | int) -> Expr:
        """Byte offset of a piece."""
        column = i32(16 * piece) if isinstance(piece, int) else piece * i32(16)
        start = i32(self.start) if isinstance(self.start, int) else self.start
        return start + row * i32(self.pitch) + column


def put_queries(place: Place, operands: Operands, tile: Tile | Panels, thread: Expr, threads: int) -> None:
    """Scale and round the block's queries into a tile; rows that do not exist are zero."""
    spec = place.rows.spec
    total = tile.rows * tile.pieces
    with T.serial(i32(0), i32(-(-total // threads))) as step:
        number = T.bind(thread + step * i32(threads))
        row, piece = T.bind(number // i32(tile.pieces)), T.bind(number % i32(tile.pieces))
        token = place.token(row)
        words = registers(4, "uint32")
        for word in range(4):
            store(words, word, T.uint32(0))
        inside = T.And(place.exists(row, token), piece < i32(spec.key_dim // PIECE))
        with when(inside):
            source = T.cast(token, "int64") * i64(spec.query_heads) + T.cast(place.head(row), "int64")
            start = T.bind(source * i64(spec.key_dim) + T.cast(piece * i32(PIECE), "int64"))
            scaled = [
                clamped(spec.dtype, T.bind(x * T.float32(query_scale(spec))))
                for x in floats(operands.q, start, PIECE)
            ]
            for word in range(4):
                store(words, word, pack(spec.dtype, scaled[2 * word], scaled[2 * word + 1]))
        with when(number < i32(total)):
            target = element(tile.memory, T.bind(tile.at(row, piece)))
            call("store_16", target, *(T.bind(load(words, word)) for word in range(4)))


@dataclass(frozen=True)
class Source:
    """A cache that tiles are copied from."""

    cache: Buffer
    kv_heads: int
    size: int
    """Elements of a row."""
    table: Buffer

    def read_pages(self, pages: Buffer, segment: Segment, tile: Expr, rows: int) -> None:
        """Remember the pages of a tile of ``rows`` keys, within the segment's positions."""
        for number in range(rows // PAGE_TOKENS):
            page = tile * i32(rows // PAGE_TOKENS) + i32(number)
            lowest, highest = segment.first // i32(PAGE_TOKENS), segment.last // i32(PAGE_TOKENS)
            inside = T.bind(T.max(lowest, T.min(page, highest)))
            store(pages, number, load(self.table, segment.table + T.cast(inside, "int64")))

    def copy(
        self,
        target: Tile,
        pages: Buffer,
        head: Expr,
        segment: Segment,
        tile: Expr,
        thread: Expr,
        threads: int,
    ) -> None:
        """Start to copy a tile; what is outside the segment's positions becomes zero."""
        copy = _Copy(self, target, pages, head, thread, threads)
        begin = T.bind(tile * i32(target.rows))
        whole = T.And(begin >= segment.first, begin + i32(target.rows - 1) <= segment.last)
        if self.size % (2 * PIECE):
            copy.emit((begin, segment))
        else:
            either(whole, lambda: copy.emit(None), lambda: copy.emit((begin, segment)))


@dataclass(frozen=True)
class _Copy:
    """Threads over a tile: ``lanes`` of them to a row, so that all addresses are sums with constants."""

    source: Source
    target: Tile
    pages: Buffer
    head: Expr
    thread: Expr
    threads: int

    @property
    def lanes(self) -> int:
        return min(32, 1 << (self.target.pieces - 1).bit_length())

    def emit(self, checked: tuple[Expr, Segment] | None) -> None:
        """Emit the copies; ``checked`` is the tile's first position and the segment that it is not all inside of."""
        lanes, rows = self.lanes, self.threads // self.lanes
        first, piece = T.bind(self.thread // i32(lanes)), T.bind(self.thread % i32(lanes))
        bases = [
            self._base(load(self.pages, number)) for number in range(max(1, self.target.rows // PAGE_TOKENS))
        ]
        inside = T.bind(first % i32(PAGE_TOKENS) * i32(self.source.size) + piece * i32(PIECE))
        starts = [T.bind(base + T.cast(inside, "int64")) for base in bases]
        target = T.bind(self.target.at(first, piece))
        for start in range(0, self.target.rows, rows):
            place = starts[start // PAGE_TOKENS]
            if rows > PAGE_TOKENS and len(starts) > 1:
                place = T.bind(T.Select(first % i32(2 * PAGE_TOKENS) < i32(PAGE_TOKENS), *starts))
            for column in range(0, self.target.pieces, lanes):
                conditions = []
                if column + lanes > self.target.pieces:
                    conditions.append(piece + i32(column) < i32(self.target.pieces))
                if start + rows > self.target.rows:
                    conditions.append(first + i32(start) < i32(self.target.rows))
                with _when_all(conditions):
                    offset = start % PAGE_TOKENS * self.source.size + column * PIECE
                    arguments = (
                        element(self.target.memory, target + i32(start * self.target.pitch + 16 * column)),
                        element(self.source.cache, place + i64(offset)),
                    )
                    if checked is None:
                        call("copy_async_16", *arguments)
                    else:
                        valid = self._valid(*checked, first + i32(start), piece + i32(column))
                        call("copy_async_16_if", *arguments, valid)

    def _base(self, page: Expr) -> Expr:
        row = T.cast(page, "int64") * i64(self.source.kv_heads) + T.cast(self.head, "int64")
        return T.bind(row * i64(PAGE_TOKENS * self.source.size))

    def _valid(self, begin: Expr, segment: Segment, row: Expr, piece: Expr) -> Expr:
        position = T.bind(begin + row)
        seen = T.And(position >= segment.first, position <= segment.last)
        return T.bind(T.And(seen, piece < i32(self.source.size // PIECE)))


@contextmanager
def _when_all(conditions: list[Expr]) -> Iterator[None]:
    if not conditions:
        yield
        return
    condition = conditions[0]
    for other in conditions[1:]:
        condition = T.And(condition, other)
    with when(condition):
        yield
