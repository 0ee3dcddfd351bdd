"""Flash attention of chosen runs over one round of expanded keys on Hopper GPUs, with products of four warps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.expanded.heads import bounds_of as run_bounds
from moec.compiler.kernels.cuda.attention.expanded.heads import (
    query_tiles,
    resume,
    span_of,
    suspend,
    tile_at,
)
from moec.compiler.kernels.cuda.attention.operands import Operands, first_seen
from moec.compiler.kernels.cuda.attention.prefill.softmax import begin, write
from moec.compiler.kernels.cuda.attention.prefill.warpgroups import KEYS, THREADS, allocate, attend, fits
from moec.compiler.kernels.cuda.attention.tiles import put_queries
from moec.compiler.kernels.cuda.many.panels import PANEL, PANEL_PIECES, ROW_BYTES, Panels
from moec.compiler.kernels.cuda.primitives import (
    call,
    element,
    i32,
    launch,
    launch_next,
    wait_previous,
)
from moec.compiler.kernels.emit import Buffer, Expr, either, i64, when

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cuda.attention.expanded.plan import Run
    from moec.compiler.kernels.cuda.attention.expanded.room import Expanded, Room
    from moec.compiler.kernels.cuda.attention.rows import Place

PIECE = 8
PASS_ROWS = THREADS // PANEL_PIECES


def fits_heads(room: Room) -> bool:
    """Whether this kernel takes the heads' shape."""
    return fits(room.spec.expanded) and room.heads.nope_dim % PANEL == 0 and room.rope_dim % PANEL == 0


def emit_heads_hopper(operands: Operands, expanded: Expanded, number: Expr) -> None:
    """Launch round ``number``."""
    spec = expanded.room.spec.expanded
    with launch((spec.query_heads, query_tiles(operands)), THREADS) as ((head, late), thread):
        memory = allocate(spec, thread)
        wait_previous()
        with tile_at(spec, expanded, head, late, thread) as (run, place):
            span, lowest, highest = span_of(spec, expanded, run, place, number, KEYS)
            low, high = span
            with when(low <= high):
                put_queries(place, operands, memory.queries, thread, THREADS)
                sums = begin(spec, 1, thread)
                with when(low > lowest):
                    resume(spec, expanded, operands, place, sums)
                first_row = T.bind(run.row - i32(number) * i32(expanded.capacity))
                tiles = ExpandedTiles(spec, expanded, run, place, first_row, thread)
                attend(spec, memory, sums, tiles, (low, high), run_bounds(spec, run, place, sums))
                either(
                    high == highest,
                    lambda: write(place, operands, sums),
                    lambda: suspend(spec, expanded, operands, place, sums),
                )
        launch_next()


@dataclass(frozen=True)
class ExpandedTiles:
    """Rows of one round, those of a run counted from its lowest position."""

    spec: AttentionSpec
    expanded: Expanded
    run: Run
    place: Place
    first_row: Expr
    """The run's, within the round; may be before it."""
    thread: Expr

    def first_position(self, tile: Expr) -> Expr:
        """Of its keys."""
        return self.run.lowest + tile * i32(KEYS)

    def whole(self, tile: Expr) -> Expr:
        """Whether all rows see all its keys."""
        start = self.run.position + self.place.first_token - self.run.first
        latest = T.bind(self.run.position + self.place.end_token - i32(1) - self.run.first)
        position = self.first_position(tile)
        return T.And(position >= first_seen(self.spec, latest), position + i32(KEYS) <= start + i32(1))

    def copy_keys(self, tile: Expr, target: Panels, stage: Expr) -> None:
        """Start to copy a tile's keys: those of the head, and the part that all heads share."""
        expanded, room = self.expanded, self.expanded.room
        own = room.heads.nope_dim
        self._copy(expanded.keys, own, self._head_row(tile), target, stage, 0)
        self._copy(expanded.shared, room.rope_dim, self._row(tile), target, stage, own // PANEL)

    def copy_values(self, tile: Expr, target: Panels, stage: Expr) -> None:
        """Start to copy a tile's values."""
        self._copy(self.expanded.values, self.spec.value_dim, self._head_row(tile), target, stage, 0)

    def _row(self, tile: Expr) -> Expr:
        return T.bind(i64(self.first_row + tile * i32(KEYS)))

    def _head_row(self, tile: Expr) -> Expr:
        return T.bind(i64(self.place.kv_head) * self.expanded.capacity + self._row(tile))

    def _copy(self, source: Buffer, size: int, first: Expr, target: Panels, stage: Expr, panel: int) -> None:
        """A tile's rows of ``size`` elements from row ``first`` on, into the panels from ``panel`` on."""
        row, piece = T.bind(self.thread // i32(PANEL_PIECES)), T.bind(self.thread % i32(PANEL_PIECES))
        begin = T.bind(first * i64(size) + i64(row * i32(size) + piece * i32(PIECE)))
        place = T.bind(target.at(row, piece) + stage)
        for turn in range(KEYS // PASS_ROWS):
            for number in range(size // PANEL):
                offset = (panel + number) * target.panel_bytes + turn * PASS_ROWS * ROW_BYTES
                call(
                    "copy_async_16",
                    element(target.memory, place + i32(offset)),
                    element(source, begin + i64(turn * PASS_ROWS * size + number * PANEL)),
                )
