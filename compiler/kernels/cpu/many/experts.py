"""Experts that many tokens chose: their pairs lie in tiles, from the gathered vectors to the last product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.many.cover import tiles_of
from moec.compiler.kernels.cpu.many.gather import gather, round_tile, scatter, zeros
from moec.compiler.kernels.cpu.many.strip import StripRows, strip
from moec.compiler.kernels.cpu.many.tiles import new_tiles
from moec.compiler.kernels.cpu.weights import memory_at
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    ceildiv,
    div,
    i64,
    keep,
    load,
    loop,
    scope,
    scratch,
    store,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cpu.expert_parts import ExpertParts, ExpertTensors
    from moec.compiler.kernels.cpu.grouping import Groups
    from moec.compiler.kernels.cpu.many.tiles import Depth

STRIP_TILES = 4
"""Of one expert whose results a thread keeps in its first- or second-level cache."""


@dataclass(frozen=True)
class PairTiles:
    """The tiles of all experts with many pairs, one expert after the other."""

    count: Expr
    begins: Buffer
    """Of those experts: their first tile, and one end after the last."""
    firsts: Buffer
    """Of each tile: the place of its first pair, and of its expert's last one."""
    lasts: Buffer


def pair_tiles(groups: Groups, pairs: Expr, lanes: int) -> PairTiles:
    """Emit the count of tiles and what each of them holds; ``pairs`` bounds their number."""
    many = keep(groups.active - groups.few)
    most = keep(ceildiv(pairs, lanes) + many)
    begins = scratch(many + i64(1), "int64")
    firsts, lasts = scratch(most, "int64"), scratch(most, "int64")
    store(begins, i64(0), i64(0))
    with loop(many) as number:
        expert = keep(number + groups.few)
        begin, first = keep(load(begins, number)), keep(groups.start(expert))
        size = keep(groups.size(expert))
        with loop(tiles_of(size, lanes)) as tile:
            store(firsts, begin + tile, first + tile * i64(lanes))
            store(lasts, begin + tile, first + size - i64(1))
        store(begins, number + i64(1), begin + tiles_of(size, lanes))
    return PairTiles(keep(load(begins, many)), begins, firsts, lasts)


class ManyExperts:
    """Emits the work of one call."""

    def __init__(
        self,
        parts: ExpertParts,
        depths: tuple[Depth, Depth],
        call: ExpertTensors,
        groups: Groups,
        pairs: Expr,
    ) -> None:
        self.parts, self.call, self.groups = parts, call, groups
        self.body, self.machine = parts.body, parts.machine
        self.lanes = self.machine.lanes
        self.tiles = pair_tiles(groups, pairs, self.lanes)
        self.wide, self.narrow = depths
        self.middle = scratch(self.tiles.count * i64(self.narrow.padded * self.lanes))
        """``activation(gate, up)``: float32 ``[tiles, padded, lanes]``."""

    def gather(self) -> None:
        """The vectors of all pairs, before ``gate_up``."""
        self.x = tiles = new_tiles(self.wide, self.tiles.count)
        with loop(self.tiles.count, parallel=True) as number:
            first, last = keep(load(self.tiles.firsts, number)), keep(load(self.tiles.lasts, number))
            places = [T.min(first + i64(lane), last) for lane in range(self.lanes)]
            pairs = [self.groups.pair(keep(place)) for place in places]
            starts = [keep(div(pair, self.call.chosen) * i64(self.body.hidden)) for pair in pairs]
            gather(tiles, number, self.call.x, starts)
            rows = self.body.intermediate
            end = (number * i64(self.narrow.padded) + i64(rows)) * i64(self.lanes)
            zeros(self.middle, end, self.narrow.padded - rows, self.lanes)

    def gate_up(self, expert: Expr, first: Expr, rows: int) -> None:
        """``middle`` of an expert's pairs, for rows from ``first``."""
        with scope():
            self._gate_up(expert, first, rows)

    def _gate_up(self, expert: Expr, first: Expr, rows: int) -> None:
        lanes = self.lanes
        names = ("gate", "up") if self.body.gated else ("up",)
        size = STRIP_TILES * rows * lanes
        results = scratch(len(names) * size)

        def emit(begin: Expr, _place: Expr, tokens: Expr) -> None:
            with loop(len(names)) as part:
                rows_of = self._rows(expert, names, part, first, rows)
                strip(rows_of, self.x, begin, tokens, results, keep(part * i64(size)))
            with loop(tiles_of(tokens, lanes)) as tile, loop(rows) as row:
                place = (tile * i64(rows) + row) * i64(lanes)
                variables = {
                    name: keep(load(results, place + i64(number * size), lanes))
                    for number, name in enumerate(names)
                }
                target = ((begin + tile) * i64(self.narrow.padded) + first + row) * i64(lanes)
                store(self.middle, target, self.parts.activation(variables), lanes)

        self._strips(expert, emit)

    def round_middle(self) -> None:
        """What the last product takes, before ``down``."""
        self.rounded = tiles = new_tiles(self.narrow, self.tiles.count)
        with loop(self.tiles.count, parallel=True) as number:
            round_tile(tiles, number, self.middle)

    def down(self, expert: Expr, first: Expr, rows: int, results: Buffer) -> None:
        """``results[pair, row]`` of an expert's pairs, for rows from ``first``."""
        with scope():
            own = scratch(STRIP_TILES * rows * self.lanes)

            def emit(begin: Expr, place: Expr, tokens: Expr) -> None:
                strip(
                    self._rows(expert, ("down",), i64(0), first, rows),
                    self.rounded,
                    begin,
                    tokens,
                    own,
                    i64(0),
                )
                pair = self.groups.pair
                scatter(own, rows, tokens, self.lanes, results, lambda token: pair(place + token) * i64(rows))

            self._strips(expert, emit)

    def _strips(self, expert: Expr, emit: Callable[[Expr, Expr, Expr], None]) -> None:
        """Call ``emit(first tile, first place, tokens)`` for a few tiles of an expert at a time."""
        begin = keep(load(self.tiles.begins, expert - self.groups.few))
        start, size = keep(self.groups.start(expert)), keep(self.groups.size(expert))
        tokens = STRIP_TILES * self.lanes
        with loop(ceildiv(size, tokens)) as number:
            done = keep(number * i64(tokens))
            first = keep(begin + number * i64(STRIP_TILES))
            emit(first, keep(start + done), keep(T.min(i64(tokens), size - done)))

    def _rows(self, expert: Expr, names: tuple[str, ...], part: Expr, first: Expr, count: int) -> StripRows:
        """Rows of the ``part``-th of parts that lie at equal distances."""
        layout = self.parts.layout
        address = load(self.call.table, self.groups.expert(expert))

        def begin(parts: list[str]) -> Expr:
            places = [layout.part(name).offset_bytes for name in parts]
            return keep(address + i64(places[0]) + part * i64(places[-1] - places[0]))

        view = memory_at(begin(list(names)), layout.part(names[0]).size_bytes)
        biased = self.body.down_bias if names == ("down",) else self.body.up_bias
        if not biased:
            return StripRows(view, first, count, lambda _row: None)
        bias = self.parts.bias_at(begin([f"{name}_bias" for name in names]), layout.part(names[0]).shape[0])
        return StripRows(view, first, count, bias)
