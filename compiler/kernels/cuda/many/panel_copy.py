"""Copies of an operand's rows into panels of shared memory, stage by stage, by a number of threads."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.many.panels import PANEL, PANEL_PIECES, ROW_BYTES, PanelRows, Panels
from moec.compiler.kernels.cuda.many.tiles import CHUNK, Rows, Terms
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import i64, load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr


@dataclass(frozen=True)
class Copiers:
    """The threads that share a copy: this one's number among so many, and from one stage to the next in bytes."""

    thread: Expr
    threads: int
    stage_bytes: int


class BulkCopy:
    """The copies of a tile that lies in panels already: one thread starts them, a barrier hears of their arrival."""

    def __init__(self, rows: PanelRows, target: Panels, copiers: Copiers, arrived: Buffer) -> None:
        self.rows, self.target, self.copiers, self.arrived = rows, target, copiers, arrived
        self.size = T.bind(rows.left * i32(ROW_BYTES))

    def emit(self, step: Expr, stage: Expr) -> None:
        """Start the copy of step ``step`` of k into a stage."""
        start = i32(self.target.start) + stage * i32(self.copiers.stage_bytes)
        with when(self.copiers.thread == i32(0)):
            target = cuda.element(self.target.memory, T.bind(start))
            source = cuda.element(self.rows.buffer, T.bind(self.rows.place(step)))
            cuda.call("phase_bulk", cuda.element(self.arrived, stage), target, source, self.size)


class PanelCopy:
    """A thread's share of the copies of one operand: one piece of every so many rows."""

    def __init__(self, rows: Rows, target: Panels, terms: Terms, copiers: Copiers) -> None:
        assert rows.unit == CHUNK, "rows are 16-byte aligned"
        self.rows, self.target, self.terms, self.copiers = rows, target, terms, copiers
        self.piece = T.bind(copiers.thread % i32(PANEL_PIECES))
        row = T.bind(copiers.thread // i32(PANEL_PIECES))
        self.place = T.bind(target.at(row, self.piece))
        self.stride = copiers.threads // PANEL_PIECES
        assert target.rows % self.stride == 0
        self.turns = target.rows // self.stride
        self.offsets = cuda.registers(self.turns, "uint32")
        for turn in range(self.turns):
            offset = rows.offset(row + i32(turn * self.stride)) + self.piece
            store(self.offsets, turn, T.cast(offset, "uint32"))
        turns = range(self.turns) if rows.left is not None else ()
        self.exists = [T.bind(row + i32(turn * self.stride) < rows.left) for turn in turns]

    def begin(self, count: int) -> None:
        """Start the copies of the first stages."""
        for stage in range(count):
            self.emit(i32(stage), i32(stage))

    def emit(self, step: Expr, stage: Expr) -> None:
        """Start the copies of step ``step`` of k into a stage."""
        rows, memory = self.rows, self.target.memory
        own, before = self.terms.place(step)
        start = T.bind(rows.start + i64(before + own * i32(PANEL)))
        place = T.bind(stage * i32(self.copiers.stage_bytes) + self.place)
        inside = None
        if rows.depth % PANEL:
            inside = T.bind(own * i32(PANEL) + self.piece * i32(CHUNK) < i32(rows.depth))
        for turn in range(self.turns):
            target = cuda.element(memory, place + i32(turn * self.stride * ROW_BYTES))
            source = start + i64(load(self.offsets, turn)) * i64(CHUNK)
            with when(self.exists[turn]) if self.exists else nullcontext():
                if inside is None:
                    cuda.call("copy_async_16", target, cuda.element(rows.buffer, source))
                else:
                    origin = cuda.element(rows.buffer, T.Select(inside, source, i64(0)))
                    cuda.call("copy_async_16_if", target, origin, inside)
