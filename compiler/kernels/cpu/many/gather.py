"""Vectors into tiles, transposed in registers and rounded; results out of tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.packed_codes import as_float
from moec.compiler.kernels.cpu.rounding import round_to_codes, scale_of
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    div,
    i64,
    keep,
    load,
    loop,
    mod,
    registers,
    scratch,
    splat,
    store,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.compiler.kernels.cpu.many.tiles import Tiles


def transpose(vectors: list[Expr], lanes: int) -> list[Expr]:
    """``lanes`` vectors of as many elements, turned round."""
    low, high = (
        [
            tirx.IntImm("int32", place)
            for pair in range(first, first + lanes // 2)
            for place in (pair, pair + lanes)
        ]
        for first in (0, lanes // 2)
    )
    width = 1
    while width < lanes:
        half = lanes // 2
        pairs = [(vectors[number], vectors[number + half]) for number in range(half)]
        vectors = [
            keep(tirx.Shuffle([first, second], places)) for first, second in pairs for places in (low, high)
        ]
        width *= 2
    return vectors


def transposed(
    source: Buffer, starts: Sequence[Expr], first: Expr, columns: int, target: Buffer, place: Expr
) -> None:
    """Elements ``first .. first + columns - 1`` of vectors to ``target [columns, lanes]`` from element ``place``."""
    lanes = len(starts)
    with loop(columns // lanes) as step:
        begin = keep(first + step * i64(lanes))
        vectors = [keep(load(source, start + begin, lanes)) for start in starts]
        for column, vector in enumerate(transpose(vectors, lanes)):
            store(target, place + (step * i64(lanes) + i64(column)) * i64(lanes), vector, lanes)
    with loop(columns % lanes) as step:
        column = keep(step + i64(columns // lanes * lanes))
        for lane, start in enumerate(starts):
            store(target, place + column * i64(lanes) + i64(lane), load(source, start + first + column))


def gather(tiles: Tiles, number: Expr, source: Buffer, starts: Sequence[Expr]) -> None:
    """Make tile ``number`` of float32 vectors that begin at these elements, one a lane."""
    depth = tiles.depth
    lanes, group = depth.machine.lanes, depth.kind.group
    part = scratch(group * lanes)
    whole = depth.columns // group
    with loop(whole) as step:
        transposed(source, starts, keep(step * i64(group)), group, part, i64(0))
        _round_group(tiles, number, step, group, part, i64(0))
    rest = depth.columns - whole * group
    if rest:
        padded = depth.padded - whole * group
        transposed(source, starts, i64(whole * group), rest, part, i64(0))
        zeros(part, i64(rest * lanes), padded - rest, lanes)
        _round_group(tiles, number, i64(whole), padded, part, i64(0))


def round_tile(tiles: Tiles, number: Expr, source: Buffer) -> None:
    """Make tile ``number`` of that of the same number in float32, ``[N, padded, lanes]``."""
    depth = tiles.depth
    lanes, group = depth.machine.lanes, depth.kind.group
    place = keep(number * i64(depth.padded * lanes))
    whole = depth.padded // group
    with loop(whole) as step:
        _round_group(tiles, number, step, group, source, keep(place + step * i64(group * lanes)))
    rest = depth.padded - whole * group
    if rest:
        _round_group(tiles, number, i64(whole), rest, source, keep(place + i64(whole * group * lanes)))


def zeros(buffer: Buffer, place: Expr, vectors: int, lanes: int) -> None:
    """Set so many vectors from element ``place`` on."""
    with loop(vectors) as step:
        store(buffer, place + step * i64(lanes), splat(0.0, lanes), lanes)


def _round_group(tiles: Tiles, number: Expr, group: Expr, columns: int, source: Buffer, place: Expr) -> None:
    """Round the ``columns`` vectors of a group, an even number of them, which begin at ``place``."""
    depth = tiles.depth
    lanes = depth.machine.lanes
    largest = registers(lanes, "int32")
    store(largest, 0, T.Broadcast(T.int32(0), lanes), lanes)
    mask = T.Broadcast(T.int32(0x7FFFFFFF), lanes)
    with loop(columns) as column:
        value = load(source, place + column * i64(lanes), lanes)
        bits = T.reinterpret(f"int32x{lanes}", value) & mask
        store(largest, 0, T.max(load(largest, 0, lanes), bits), lanes)
    scale, inverse = scale_of(load(largest, 0, lanes), lanes)
    slot = keep((number * i64(depth.groups) + group) * i64(lanes))
    store(tiles.scales, slot, scale, lanes)
    total = registers(lanes)
    store(total, 0, splat(0.0, lanes), lanes)
    first = keep(number * i64(depth.padded // 2) + group * i64(depth.kind.group // 2))
    with loop(columns // 2) as pair:
        codes = []
        for half in range(2):
            value = load(source, place + (pair * i64(2) + i64(half)) * i64(lanes), lanes)
            codes.append(keep(round_to_codes(value, inverse, lanes)))
            if tiles.sums is not None:
                store(total, 0, load(total, 0, lanes) + as_float(codes[-1], lanes), lanes)
        low = codes[0] & T.Broadcast(T.int32(0xFFFF), lanes)
        both = low | codes[1] << T.Broadcast(T.int32(16), lanes)
        store(tiles.pairs, (first + pair) * i64(lanes), both, lanes)
    if tiles.sums is not None:
        store(tiles.sums, slot, load(total, 0, lanes) * scale, lanes)


def scatter(
    results: Buffer, rows: int, tokens: Expr, lanes: int, target: Buffer, start: Callable[[Expr], Expr]
) -> None:
    """Results ``[tiles, rows, lanes]`` of so many tokens to where each token's ``rows`` begin in a buffer."""
    with loop(tokens) as token:
        tile, lane = keep(div(token, lanes)), keep(mod(token, lanes))
        begin, first = keep(start(token)), keep(tile * i64(rows * lanes) + lane)
        with loop(rows) as row:
            store(target, begin + row, load(results, first + row * i64(lanes)))
