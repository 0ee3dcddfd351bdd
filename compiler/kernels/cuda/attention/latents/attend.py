"""Attention over latents: one wide key head, whose first dimensions are the value too.

A block of 16 query rows for each two or four warps goes through the keys 32 at a time; keys are read once for scores
and values. Each warp holds its share of the dimensions of its 16 queries in registers, so the warps add up their scores
and the first two turn half of them each to weights; then each warp has all rows, and its share of the values'
dimensions. Two tiles of keys fit beside that in 99 KB.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.convert import split
from moec.compiler.kernels.cuda.attention.fragments import load_a, load_b, load_b_transposed
from moec.compiler.kernels.cuda.attention.latents.block import OWN, WIDTH, row_number
from moec.compiler.kernels.cuda.attention.operands import HIDDEN, exponent
from moec.compiler.kernels.cuda.attention.prefill.softmax import any_differs
from moec.compiler.kernels.cuda.primitives import (
    element,
    i32,
    mma,
    pack,
    registers,
    sync,
    value,
    warp_max,
)
from moec.compiler.kernels.emit import Buffer, Expr, load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.attention.latents.block import Block
    from moec.compiler.kernels.cuda.attention.tiles import Tile


def attend(block: Block, keys: Tile, start: Expr, first: Expr, last: Expr) -> None:
    """Attend to a tile of keys that is in shared memory, before and after which all threads wait for each other.

    Args:
        block: the block.
        keys: the tile.
        start: position of its first key.
        first: first position that the lane's row sees.
        last: last position that it sees in this tile; may be before the tile.
    """
    scores = _shared_scores(block, _score(block, keys))
    _weigh(block, scores, start, first, last)
    sync()
    _rescale(block)
    _add_values(block, keys)


def _score(block: Block, keys: Tile) -> Buffer:
    """Products of the warp's queries and a tile's keys over the warp's dimensions: four fragments."""
    shape = block.shape
    scores = registers(2 * OWN)
    for place in range(2 * OWN):
        store(scores, place, T.float32(0))
    begin_piece = T.bind(block.share * i32(2 * shape.steps))
    for step in range(shape.steps):
        a = [load(block.queries, 4 * step + word) for word in range(4)]
        for pair in range(WIDTH // 16):
            for odd, b in enumerate(load_b(keys, 16 * pair, block.lane, begin_piece + i32(2 * step))):
                mma(shape.spec.dtype, element(scores, 4 * (2 * pair + odd)), a, b)
    return scores


def _shared_scores(block: Block, scores: Buffer) -> list[Expr]:
    """The lane's row's scores, of all dimensions: this warp's, and those of the warps with the others."""
    shape = block.shape
    kept = []
    for number in range(OWN):
        place = number // 2 * 4 + number % 2
        lower, upper = load(scores, place), load(scores, place + 2)
        if shape.exact:
            kept.append(T.bind(lower + upper))
            given = kept[-1]
        else:
            kept.append(T.bind(T.Select(block.half == i32(0), lower, upper)))
            given = T.Select(block.half == i32(0), upper, lower)
        store(block.words, _handed(block, block.warp, number), given)
    sync()
    if shape.across == 2:
        partner = T.bind((block.warp + i32(shape.row_tiles)) % i32(shape.warps))
        return [
            T.bind(score + load(block.words, _handed(block, partner, number)))
            for number, score in enumerate(kept)
        ]
    warps = [T.bind(block.row_tile + i32(shape.row_tiles * share)) for share in range(shape.across)]
    return [
        _added([load(block.words, _handed(block, warp, number)) for warp in warps]) for number in range(OWN)
    ]


def _added(numbers: list[Expr]) -> Expr:
    """Their sum, always in the same order: warps that do the same have the same bits."""
    total = numbers[0]
    for number in numbers[1:]:
        total = total + number
    return T.bind(total)


def _handed(block: Block, warp: Expr, number: int) -> Expr:
    return i32(block.exchange + 32 * number) + warp * i32(32 * OWN) + block.lane


def _weigh(block: Block, scores: list[Expr], start: Expr, first: Expr, last: Expr) -> None:
    """The lane's row's scores to weights in shared memory; what its sums are to be multiplied with beside them."""
    spec = block.shape.spec
    begin_position = T.bind(start + block.lane % i32(4) * i32(2))
    below, beyond = T.bind(first - begin_position), T.bind(last - begin_position)
    shown = []
    largest = T.bind(load(block.highest, 0))
    for number, score in enumerate(scores):
        offset = i32(number // 2 * 8 + number % 2)
        seen = T.And(offset >= below, offset <= beyond)
        shown.append(T.bind(T.Select(seen, exponent(spec, score), T.float32(HIDDEN))))
        largest = T.bind(T.max(largest, shown[-1]))
    largest = warp_max(largest, 4)
    scale = value("float32", "exp2", load(block.highest, 0) - largest)
    store(block.highest, 0, largest)
    weights = [value("float32", "exp2", score - largest) for score in shown]
    total = T.bind(load(block.total, 0) * scale)
    for weight in weights:
        total = T.bind(total + weight)
    store(block.total, 0, total)
    with nullcontext() if block.shape.across == 2 else when(block.share < i32(2)):
        for pair in range(OWN // 2):
            word = _weight_word(block, weights[2 * pair], weights[2 * pair + 1])
            place = block.weights.at(block.row, pair) // i32(4) + block.lane % i32(4)
            store(block.bits, T.bind(place), word)
        with when(block.lane % i32(4) == i32(0)):
            store(block.words, i32(block.row_numbers) + block.row, scale)


def _weight_word(block: Block, low: Expr, high: Expr) -> Expr:
    dtype = block.shape.spec.dtype
    if not block.shape.exact:
        return pack(dtype, low, high)
    rounded, rest = split(dtype, low, high)
    return T.Select(block.half == i32(0), rounded, rest)


def _rescale(block: Block) -> None:
    tiles, fragments = block.shape.row_tiles, block.shape.fragments
    scales = [T.bind(row_number(block, tile, upper)) for tile in range(tiles) for upper in range(2)]
    with when(any_differs(scales)):
        for row, scale in enumerate(scales):
            for fragment in range(fragments):
                for odd in range(2):
                    place = 4 * (row // 2 * fragments + fragment) + 2 * (row % 2) + odd
                    store(block.values, place, load(block.values, place) * scale)


def _add_values(block: Block, keys: Tile) -> None:
    shape = block.shape
    first = T.bind(block.warp * i32(shape.columns // 8))
    for step in range(WIDTH // 16):
        a = [load_a(block.weights, 16 * tile, block.lane, step) for tile in range(shape.row_tiles)]
        for column in range(shape.fragments // 2):
            for odd, b in enumerate(load_b_transposed(keys, 16 * step, block.lane, first + i32(2 * column))):
                for tile in range(shape.row_tiles):
                    place = 4 * (tile * shape.fragments + 2 * column + odd)
                    mma(shape.spec.dtype, element(block.values, place), a[tile], b)
