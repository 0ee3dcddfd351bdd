"""Pieces of a call of experts for few tokens: any range of the rows that a phase goes over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.expert_parts import Cover, ExpertParts, ExpertTensors, Group, Source, writer
from moec.compiler.kernels.cpu.grouping import group_by_expert
from moec.compiler.kernels.cpu.tiling import stream, stream_halves
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    ceildiv,
    div,
    i64,
    keep,
    load,
    loop,
    registers,
    scope,
    scratch,
    store,
    when,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cpu.machine import Machine

STRIP_ROWS = 32
"""Rows whose sums a thread keeps before it goes on with them; a multiple of every vector's lanes."""
AHEAD = (64,)
"""Cache lines before a row that memory is asked for it. A thread reads two rows at once: on 15 cores of a Xeon with an
H100 two streams with this distance read 137 to 150 GB/s, one 111 to 128."""
STRIP_PAIRS = 8
"""Pairs of one expert that are run at once."""


class _Pieces:
    """Emits the work on pieces of a phase of one request.

    Args:
        body: of the layer's experts.
        machine: the processor.
        call: the request.
        middle: ``[pairs, I]``, between the phases.
    """

    def __init__(self, body: ExpertBody, machine: Machine, call: ExpertTensors, middle: Buffer) -> None:
        self.body, self.machine, self.call, self.middle = body, machine, call, middle
        self.parts = ExpertParts(body, machine)
        self.pairs = keep(call.tokens * call.chosen)
        self.groups = group_by_expert(call.index, self.pairs, call.experts)

    def _tiles(self, expert: Expr, emit: Callable[[Group], None]) -> None:
        groups = self.groups
        address = keep(load(self.call.table, groups.expert(expert)))
        start, size = keep(groups.start(expert)), keep(groups.size(expert))
        with loop(ceildiv(size, STRIP_PAIRS)) as tile:
            done = keep(tile * i64(STRIP_PAIRS))
            emit(Group(address, keep(start + done), keep(T.min(i64(STRIP_PAIRS), size - done))))


class GateUpPieces(_Pieces):
    """Of all experts' intermediate rows, one expert after the other."""

    def __init__(self, body: ExpertBody, machine: Machine, call: ExpertTensors, middle: Buffer) -> None:
        super().__init__(body, machine, call, middle)
        self.rounded = self.parts.round_vectors(body.hidden, call.x, call.tokens)

    def piece(self, number: Expr, chunks: Expr) -> None:
        """Emit piece ``number`` of ``chunks``."""
        rows = i64(self.body.intermediate)
        begin, end = _range(number, chunks, self.groups.active * rows)
        with loop(self.groups.active) as expert:
            before = keep(expert * rows)
            first, last = keep(T.max(begin - before, i64(0))), keep(T.min(end - before, rows))
            with when(first < last):
                _strips(first, last, lambda start, count: self._gate_up_strip(expert, start, count))

    def _gate_up_strip(self, expert: Expr, first: Expr, rows: Expr) -> None:
        """``middle[place, i] = activation(gate, up)`` of one expert's pairs, for at most ``STRIP_ROWS`` rows."""
        groups, chosen = self.groups, self.call.chosen
        go, at_once = (stream, 1) if self.body.gated else (stream_halves, 2)
        cover = Cover(
            lambda columns, open_rows: go(rows, columns, open_rows), stream_rows=at_once, ahead=AHEAD
        )
        buffers = {
            part: registers(STRIP_PAIRS * STRIP_ROWS)
            for part in (("gate", "up") if self.body.gated else ("up",))
        }

        def tile(group: Group) -> None:
            source = Source(self.call.x, lambda place: div(groups.pair(place), chosen), self.rounded)
            writers = {
                part: writer(target, STRIP_ROWS, lambda place: place - group.start)
                for part, target in buffers.items()
            }
            self.parts.product(writers, group, first, source, cover)
            self.parts.activate(buffers, STRIP_ROWS, group.count)
            with loop(group.count) as column, loop(rows) as row:
                place = (group.start + column) * i64(self.body.intermediate) + first + row
                store(self.middle, place, load(buffers["up"], column * i64(STRIP_ROWS) + row))

        self._tiles(expert, tile)


class DownPieces(_Pieces):
    """Of the result's rows: a token's choices, weighted and added up."""

    def __init__(self, body: ExpertBody, machine: Machine, call: ExpertTensors, middle: Buffer) -> None:
        super().__init__(body, machine, call, middle)
        self.rounded = self.parts.round_vectors(body.intermediate, middle, self.groups.pairs)

    def piece(self, number: Expr, chunks: Expr) -> None:
        """Emit piece ``number`` of ``chunks``."""
        begin, end = _range(number, chunks, i64(self.body.hidden))
        with scope():
            results = scratch(self.pairs * i64(STRIP_ROWS))

            def strip(first: Expr, rows: Expr) -> None:
                cover = Cover(
                    lambda columns, open_rows: stream_halves(rows, columns, open_rows),
                    stream_rows=2,
                    ahead=AHEAD,
                )

                def tile(group: Group) -> None:
                    source = Source(self.middle, lambda place: place, self.rounded)
                    writers = {"down": writer(results, STRIP_ROWS, self.groups.pair)}
                    self.parts.product(writers, group, first, source, cover)

                with loop(self.groups.active) as expert:
                    self._tiles(expert, tile)
                with loop(self.call.tokens) as token:
                    self.parts.combine(self.call, token, results, STRIP_ROWS, first, rows)

            _strips(begin, end, strip)


def _range(number: Expr, chunks: Expr, total: Expr) -> tuple[Expr, Expr]:
    """The ``number``-th of ``chunks`` equal parts of ``0 .. total-1``."""
    return keep(div(number * total, chunks)), keep(div((number + i64(1)) * total, chunks))


def _strips(first: Expr, last: Expr, emit: Callable[[Expr, Expr], None]) -> None:
    """Call ``emit(first row, rows)`` for at most ``STRIP_ROWS`` rows at a time."""
    with loop(ceildiv(last - first, STRIP_ROWS)) as strip:
        start = keep(first + strip * i64(STRIP_ROWS))
        emit(start, keep(T.min(i64(STRIP_ROWS), last - start)))
