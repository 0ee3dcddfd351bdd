"""An indexer's scores on tensor cores: a warp takes a page, keys from global memory straight into operands.

A product's left operand has eight heads' queries, rounded, and below them what rounding left out, so scores are as
exact as float32's. Keys are read 16 bytes a lane; which eight dimensions those are does not matter to a product as
long as queries, in shared memory as operands, are in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cuda.attention.convert import clamped, split
from moec.compiler.kernels.cuda.attention.operands import cache_row
from moec.compiler.kernels.cuda.primitives import (
    LANES,
    call,
    element,
    i32,
    mma,
    registers,
    shared,
    sync,
    value,
)
from moec.compiler.kernels.cuda.selection.ranks import Ranks, pages_of
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import Buffer, Expr, i64, load, store, when
from moec.compiler.kernels.selection_arguments import IndexKeys

if TYPE_CHECKING:
    from moec.artifacts.model import SelectionSpec
    from moec.compiler.kernels.selection_arguments import SelectionOperands

TILE_HEADS = 8
CHUNK = 32
"""Dimensions that four lanes read of a key at once: two products' depth."""
MOST_BYTES = 32 << 10
"""Of queries in shared memory: what one token's may take beside other blocks'."""
WIDEST = 128
KEY_TILES = PAGE_TOKENS // 8


def fits(spec: SelectionSpec) -> bool:
    """Whether tensor cores take a selection's queries and keys."""
    layout = _Layout(spec)
    return (
        spec.dtype != "float32"
        and spec.dim % 8 == 0
        and spec.dim <= WIDEST
        and 4 * layout.words <= MOST_BYTES
    )


@dataclass(frozen=True)
class _Layout:
    """Queries as operands: ``[head tiles, steps, lanes, 4]`` words; a step is 16 dimensions."""

    spec: SelectionSpec

    @property
    def tiles(self) -> int:
        """Of heads."""
        return -(-self.spec.heads // TILE_HEADS)

    @property
    def chunks(self) -> int:
        """Of dimensions."""
        return -(-self.spec.dim // CHUNK)

    @property
    def steps(self) -> int:
        """Products for eight heads and eight keys."""
        return 2 * self.chunks

    @property
    def words(self) -> int:
        """Of a token's queries."""
        return self.tiles * self.steps * LANES * 4


class TileScores:
    """Scores of one token at a time; ``begin`` and ``rank`` are called by all threads of a block."""

    def __init__(self, spec: SelectionSpec, operands: SelectionOperands, thread: Expr, threads: int) -> None:
        self.spec, self.operands, self.thread, self.threads = spec, operands, thread, threads
        self.layout = _Layout(spec)
        self.lane = settle(tirx.truncmod(thread, i32(LANES)))
        self.queries = shared(self.layout.words, "uint32")
        self.weights = shared(self.layout.tiles * TILE_HEADS)

    def begin(self, token: Expr) -> None:
        """Put a token's queries and weights into shared memory."""
        spec, layout = self.spec, self.layout
        items, padded = layout.words // 4, layout.tiles * TILE_HEADS
        with T.serial(i32(0), i32(-(-items // self.threads))) as turn:
            number = settle(turn * i32(self.threads) + self.thread)
            with when(number < i32(items)):
                self._put(token, number)
        with when(self.thread < i32(padded)):
            head = T.min(self.thread, i32(spec.heads - 1))
            weight = load(self.operands.weight, T.cast(token, "int64") * i64(spec.heads) + i64(head))
            store(self.weights, self.thread, T.Select(self.thread < i32(spec.heads), weight, T.float32(0)))
        sync()

    def _put(self, token: Expr, number: Expr) -> None:
        """One lane's four words of one product's left operand: of four dimensions of a head."""
        spec, steps = self.spec, self.layout.steps
        lane, piece = settle(number % i32(LANES)), settle(number // i32(LANES))
        step = settle(piece % i32(steps))
        head = settle(piece // i32(steps) * i32(TILE_HEADS) + lane // i32(4))
        chunk = step // i32(2) * i32(CHUNK) + step % i32(2) * i32(4)
        first = settle(chunk + lane % i32(4) * i32(8))
        numbers = registers(4)
        for place in range(4):
            store(numbers, place, T.float32(0))
        with when(T.And(head < i32(spec.heads), first < i32(spec.dim))):
            row = T.cast(token, "int64") * i64(spec.heads) + i64(head)
            start = settle(row * i64(spec.dim) + i64(first))
            for place in range(4):
                scaled = load(self.operands.query, start + i64(place)) * T.float32(spec.scaling)
                store(numbers, place, clamped(spec.dtype, T.bind(scaled)))
        words: list[Expr] = []
        for pair in range(2):
            words += split(spec.dtype, load(numbers, 2 * pair), load(numbers, 2 * pair + 1))
        call("store_16", element(self.queries, number * i32(4)), *words)

    def rank(self, ranks: Ranks, token: Expr, count: Expr, first: Expr, step: Expr) -> None:
        """Rank ``count`` positions: pages ``first``, ``first + step`` and so on are this warp's (int32)."""
        sequence = settle(load(self.operands.appended.sequence, token))
        turns = (pages_of(count) - first + step - i32(1)) // step
        with T.serial(i32(0), T.max(turns, i32(0))) as turn:
            page = settle(first + turn * step)
            self._page(ranks, self._keys(sequence, page), page, count)

    def _keys(self, sequence: Expr, page: Expr) -> Buffer:
        """The page's right operands: for each eight keys and chunk of dimensions the lane's four words."""
        spec, chunks = self.spec, self.layout.chunks
        appended = self.operands.appended
        keys = IndexKeys(spec.dim, spec.dtype)
        row = cache_row(appended, keys, sequence, page * i32(PAGE_TOKENS), i32(0))
        start = settle(row * i64(spec.dim))
        words = registers(KEY_TILES * chunks * 4, "uint32")
        for tile in range(KEY_TILES):
            for chunk in range(chunks):
                column = settle(i32(CHUNK * chunk) + self.lane % i32(4) * i32(8))
                key = i32(8 * tile) + self.lane // i32(4)
                inside = T.min(column, i32(spec.dim - 8))
                place = settle(start + i64(key * i32(spec.dim) + inside))
                source = element(appended.k_cache, place)
                target = element(words, 4 * (tile * chunks + chunk))
                if spec.dim % CHUNK:
                    call("load_16_if", target, source, T.bind(column < i32(spec.dim)))
                else:
                    call("load_16", target, source)
        return words

    def _page(self, ranks: Ranks, keys: Buffer, page: Expr, count: Expr) -> None:
        layout, dtype = self.layout, self.spec.dtype
        totals, sums = registers(2 * KEY_TILES), registers(4 * KEY_TILES)
        for place in range(2 * KEY_TILES):
            store(totals, place, T.float32(0))
        with T.serial(i32(0), i32(layout.tiles)) as heads:
            for place in range(4 * KEY_TILES):
                store(sums, place, T.float32(0))
            for step in range(layout.steps):
                queries = registers(4, "uint32")
                place = settle(((heads * i32(layout.steps) + i32(step)) * i32(LANES) + self.lane) * i32(4))
                call("load_16", element(queries, 0), element(self.queries, place))
                a = [load(queries, word) for word in range(4)]
                for tile in range(KEY_TILES):
                    word = 4 * (tile * layout.chunks + step // 2) + 2 * (step % 2)
                    b = [load(keys, word), load(keys, word + 1)]
                    mma(dtype, element(sums, 4 * tile), a, b)
            weight = settle(load(self.weights, heads * i32(TILE_HEADS) + self.lane // i32(4)))
            for tile in range(KEY_TILES):
                for odd in range(2):
                    score = load(sums, 4 * tile + odd) + load(sums, 4 * tile + odd + 2)
                    place = 2 * tile + odd
                    store(totals, place, load(totals, place) + weight * T.max(score, T.float32(0)))
        for tile in range(KEY_TILES):
            for odd in range(2):
                total = load(totals, 2 * tile + odd)
                for mask in (4, 8, 16):
                    total = settle(total + value("float32", "shuffle_xor", total, i32(mask)))
                with when(self.lane // i32(4) == i32(tile)):
                    inside = i32(8 * tile + odd) + self.lane % i32(4) * i32(2)
                    ranks.put(settle(page * i32(PAGE_TOKENS) + inside), count, total)
