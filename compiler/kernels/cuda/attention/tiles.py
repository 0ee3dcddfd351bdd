"""Tiles of queries, keys and values in shared memory.

A row is padded to an odd number of 16-byte pieces: eight rows at the same column lie in eight different groups of
banks, which is what ``ldmatrix`` wants, and addresses stay sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from moec.artifacts.cache import PAGE_TOKENS
from moec.compiler.kernels.cpu.emit import Buffer, Expr, i64, load, store, when
from moec.compiler.kernels.cuda.attention.convert import clamped, floats
from moec.compiler.kernels.cuda.attention.operands import Operands, query_scale
from moec.compiler.kernels.cuda.attention.rows import Place, Segment
from moec.compiler.kernels.cuda.primitives import call, element, i32, pack, registers

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


def put_queries(place: Place, operands: Operands, tile: Tile, thread: Expr, threads: int) -> None:
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
        self, target: Tile, pages: Buffer, head: Expr, segment: Segment, tile: Expr, thread: Expr, threads: int
    ) -> None:
        """Start to copy a tile; what is outside the segment's positions becomes zero."""
        total = target.rows * target.pieces
        begin = T.bind(tile * i32(target.rows))
        for start in range(0, total, threads):
            number = T.bind(thread + i32(start))
            row, piece = T.bind(number // i32(target.pieces)), T.bind(number % i32(target.pieces))
            position = T.bind(begin + row)
            seen = T.And(position >= segment.first, position <= segment.last)
            valid = T.bind(T.And(seen, piece < i32(self.size // PIECE)))
            inside = T.bind(T.Select(valid, (row % i32(PAGE_TOKENS)) * i32(self.size) + piece * i32(PIECE), i32(0)))
            page = T.cast(self._page(pages, row, target.rows), "int64")
            base = (page * i64(self.kv_heads) + T.cast(head, "int64")) * i64(PAGE_TOKENS * self.size)
            source = T.bind(base + T.cast(inside, "int64"))
            arguments = (element(target.memory, T.bind(target.at(row, piece))), element(self.cache, source), valid)
            if start + threads <= total:
                call("copy_async_16_if", *arguments)
            else:
                with when(number < i32(total)):
                    call("copy_async_16_if", *arguments)

    def _page(self, pages: Buffer, row: Expr, rows: int) -> Expr:
        if rows == PAGE_TOKENS:
            return load(pages, 0)
        assert rows == 2 * PAGE_TOKENS, rows
        return T.bind(T.Select(row < i32(PAGE_TOKENS), load(pages, 0), load(pages, 1)))
