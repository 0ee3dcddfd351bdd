"""A warp's products with a tile of keys and a tile of values, and the softmax between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.bias import bias_of, bias_row
from moec.compiler.kernels.cuda.attention.fragments import load_a, load_b, load_b_transposed
from moec.compiler.kernels.cuda.attention.operands import (
    HIDDEN,
    LOG2E,
    LOWEST,
    Operands,
    exponent,
    store_results,
)
from moec.compiler.kernels.cuda.primitives import (
    element,
    i32,
    mma,
    pack,
    registers,
    value,
    warp_max,
    warp_sum,
)
from moec.compiler.kernels.emit import Buffer, Expr, i64, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cuda.attention.rows import Bounds, Place
    from moec.compiler.kernels.cuda.attention.tiles import Tile


@dataclass(frozen=True)
class Sums:
    """A lane's part of the running softmax of its warp's ``tiles`` times 16 rows."""

    tiles: int
    first_row: Expr
    """Of the warp."""
    lane: Expr
    rows: list[Expr]
    """The lane's rows: two of each tile."""
    highest: Buffer
    total: Buffer
    """Of the lane's own columns."""
    values: Buffer
    """``[tiles][fragments of 8 columns][4]``."""
    fragments: int


def begin(spec: AttentionSpec, tiles: int, thread: Expr) -> Sums:
    """Nothing seen yet."""
    fragments = -(-spec.value_dim // 16) * 2
    lane = T.bind(thread % i32(32))
    first = T.bind(thread // i32(32) * i32(16 * tiles))
    rows = [T.bind(first + lane // i32(4) + i32(8 * number)) for number in range(2 * tiles)]
    highest, total = registers(2 * tiles), registers(2 * tiles)
    values = registers(4 * tiles * fragments)
    for number in range(2 * tiles):
        store(highest, number, T.float32(LOWEST))
        store(total, number, T.float32(0))
    for number in range(4 * tiles * fragments):
        store(values, number, T.float32(0))
    return Sums(tiles, first, lane, rows, highest, total, values, fragments)


def score(spec: AttentionSpec, sums: Sums, queries: Tile, keys: Tile) -> Buffer:
    """Products of the warp's queries with a tile's keys: ``[tiles][keys / 8][4]``."""
    count = keys.rows // 8
    scores = registers(4 * sums.tiles * count)
    for number in range(4 * sums.tiles * count):
        store(scores, number, T.float32(0))
    for step in range(keys.pieces // 2):
        a = [load_a(queries, sums.first_row + i32(16 * tile), sums.lane, step) for tile in range(sums.tiles)]
        for pair in range(count // 2):
            for odd, b in enumerate(load_b(keys, 16 * pair, sums.lane, 2 * step)):
                for tile in range(sums.tiles):
                    mma(spec.dtype, element(scores, 4 * (tile * count + 2 * pair + odd)), a[tile], b)
    return scores


def add_bias(place: Place, table: Buffer, sums: Sums, scores: Buffer, bounds: Bounds, begin: Expr) -> None:
    """Add to scores what their distances have; ``begin`` is the position of the first key of the tile."""
    spec, count = place.rows.spec, int(scores.shape[0]) // (4 * sums.tiles)
    assert bounds.position is not None
    start = T.bind(begin + sums.lane % i32(4) * i32(2))
    for number, row in enumerate(sums.rows):
        zero = bias_row(spec, place.head(row))
        before = T.bind(start - load(bounds.position, number))
        for which, target in enumerate(own_places(number, count)):
            distance = before + i32(which // 2 * 8 + which % 2)
            store(scores, target, load(scores, target) + bias_of(spec, table, zero, distance))


def weigh(spec: AttentionSpec, sums: Sums, scores: Buffer, bounds: Bounds, begin: Expr, whole: Expr) -> None:
    """Scores to weights, and the running maximum, total and sums along with them."""
    cap(spec, scores)
    with when(T.Not(whole)):
        hide(sums, scores, bounds, begin)
    rescale(sums, weigh_scores(sums, scores))


def cap(spec: AttentionSpec, scores: Buffer) -> None:
    """From products to exponents, where there is a soft cap."""
    if spec.softcap:
        for number in range(int(scores.shape[0])):
            store(scores, number, exponent(spec, T.bind(load(scores, number))))


def weigh_scores(sums: Sums, scores: Buffer) -> list[Expr]:
    """Scores to weights, running maximum and total; returns what each row's sums are yet to be multiplied with."""
    count = int(scores.shape[0]) // (4 * sums.tiles)
    return [_weigh_row(sums, scores, row, count) for row in range(2 * sums.tiles)]


def rescale(sums: Sums, scales: list[Expr]) -> None:
    """Multiply the sums of each of the lane's rows."""
    with when(any_differs(scales)):
        for row, scale in enumerate(scales):
            for place in own_places(row, sums.fragments):
                store(sums.values, place, load(sums.values, place) * scale)


def any_differs(scales: list[Expr]) -> Expr:
    """Whether a scale of one of the warp's lanes is not 1: most tiles have no new maximum."""
    differs = scales[0] != T.float32(1)
    for scale in scales[1:]:
        differs = T.Or(differs, scale != T.float32(1))
    return value("uint32", "ballot", T.bind(differs)) != T.uint32(0)


def own_places(row: int, count: int) -> list[int]:
    """Where the scores of a lane's row are."""
    tile, half = divmod(row, 2)
    return [4 * (tile * count + fragment) + 2 * half + odd for fragment in range(count) for odd in range(2)]


def hide(sums: Sums, scores: Buffer, bounds: Bounds, begin: Expr) -> None:
    """Take scores away that a row does not see; ``begin`` is the position of the first."""
    count = int(scores.shape[0]) // (4 * sums.tiles)
    start = T.bind(begin + sums.lane % i32(4) * i32(2))
    for row in range(2 * sums.tiles):
        first, last = T.bind(load(bounds.first, row) - start), T.bind(load(bounds.last, row) - start)
        for number, place in enumerate(own_places(row, count)):
            position = i32(number // 2 * 8 + number % 2)
            seen = T.And(position >= first, position <= last)
            store(scores, place, T.Select(seen, load(scores, place), T.float32(HIDDEN)))


def _weigh_row(sums: Sums, scores: Buffer, row: int, count: int) -> Expr:
    """Weigh one of the lane's rows; what its sums are to be multiplied with."""
    places = own_places(row, count)
    largest = T.bind(load(sums.highest, row))
    for place in places:
        largest = T.bind(T.max(largest, load(scores, place)))
    largest = warp_max(largest, 4)
    scale = value("float32", "exp2", load(sums.highest, row) - largest)
    store(sums.highest, row, largest)
    total = T.bind(load(sums.total, row) * scale)
    for place in places:
        weight = value("float32", "exp2", load(scores, place) - largest)
        store(scores, place, weight)
        total = T.bind(total + weight)
    store(sums.total, row, total)
    return scale


def add_values(spec: AttentionSpec, sums: Sums, scores: Buffer, values: Tile) -> None:
    """Add a tile's values, weighed."""
    count = values.rows // 8

    def pair(tile: int, fragment: int, half: int) -> Expr:
        first = 4 * (tile * count + fragment) + 2 * half
        return pack(spec.dtype, load(scores, first), load(scores, first + 1))

    for step in range(count // 2):
        a = [
            [pair(tile, 2 * step + number // 2, number % 2) for number in range(4)]
            for tile in range(sums.tiles)
        ]
        for column in range(sums.fragments // 2):
            for odd, b in enumerate(load_b_transposed(values, 16 * step, sums.lane, 2 * column)):
                for tile in range(sums.tiles):
                    place = 4 * (tile * sums.fragments + 2 * column + odd)
                    mma(spec.dtype, element(sums.values, place), a[tile], b)


def inverse_total(operands: Operands, highest: Expr, total: Expr, head: Expr) -> Expr:
    """What sums of values are multiplied with in the end: the sink is part of the total."""
    if operands.sinks is None:
        return T.bind(T.float32(1) / total)
    sink = T.bind(load(operands.sinks, head) * T.float32(LOG2E))
    largest = T.bind(T.max(highest, sink))
    own = value("float32", "exp2", highest - largest)
    return T.bind(own / (total * own + value("float32", "exp2", sink - largest)))


def write(place: Place, operands: Operands, sums: Sums) -> None:
    """Write the rows' results to the output."""
    spec = place.rows.spec
    for number, row in enumerate(sums.rows):
        token = place.token(row)
        total = warp_sum(load(sums.total, number), 4)
        with when(place.exists(row, token)):
            head = place.head(row)
            scale = inverse_total(operands, load(sums.highest, number), total, head)
            target = T.cast(token, "int64") * i64(spec.query_heads) + T.cast(head, "int64")
            column = T.bind(sums.lane % i32(4) * i32(2))
            start = T.bind(target * i64(spec.value_dim) + T.cast(column, "int64"))
            places = own_places(number, sums.fragments)[: spec.value_dim // 4]
            for which in range(0, len(places), 2):
                pair = [load(sums.values, source) * scale for source in places[which : which + 2]]
                store_results(operands, T.bind(start + i64(which // 2 * 8)), *pair)
